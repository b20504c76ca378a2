"""Runs scripts in NNI's own manager, without a search."""

import json
import os
import subprocess
from pathlib import Path

import nni_node

ROOT = Path(__file__).resolve().parents[2]
NNI_NODE = Path(nni_node.__path__[0]).resolve()


def run(script, *args, hooks="undefined"):
    """Return what a script for tests/support/pace.js returns; hooks are those of elsewhere.js."""
    folders = {"NNI_NODE": str(NNI_NODE), "CHANGES": str(ROOT / "nnisearch" / "manager")}
    script = f"prepare({hooks});{script}"
    node = [NNI_NODE / "node", ROOT / "tests" / "support" / "pace.js", script, *map(str, args)]
    ended = subprocess.run(
        node, env=os.environ | folders, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
