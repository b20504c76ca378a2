"""Runs scripts in NNI's own manager, without a search."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nni_node

ROOT = Path(__file__).resolve().parents[2]
NNI_NODE = Path(nni_node.__path__[0]).resolve()


def run(script, *args):
    """Return what a script for tests/support/pace.js returns."""
    given = {
        "NNI_NODE": str(NNI_NODE),
        "PACE": str(ROOT / "nnisearch" / "manager" / "pace.js"),
        "PYTHON": sys.executable,
    }
    node = [NNI_NODE / "node", ROOT / "tests" / "support" / "pace.js", script, *map(str, args)]
    ended = subprocess.run(
        node, env=os.environ | given, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
