"""Runs scripts in NNI's own manager, without a search."""

import json
import os
import subprocess
from pathlib import Path

import nni_node

ROOT = Path(__file__).resolve().parents[2]
NNI_NODE = Path(nni_node.__path__[0]).resolve()


def start_script(script, *args, hooks="undefined", env=os.environ, **how):
    """Start a script for tests/support/pace.js; hooks are those of elsewhere.js, in JavaScript."""
    folders = {"NNI_NODE": str(NNI_NODE), "CHANGES": str(ROOT / "nnisearch" / "manager")}
    script = f"prepare({hooks});{script}"
    node = [NNI_NODE / "node", ROOT / "tests" / "support" / "pace.js", script, *map(str, args)]
    return subprocess.Popen(node, env=env | folders, text=True, stdout=subprocess.PIPE, **how)


def run(script, *args, **how):
    """Return what a script returns."""
    with start_script(script, *args, stderr=subprocess.PIPE, **how) as ended:
        printed, errors = ended.communicate(timeout=120)
    assert ended.returncode == 0, errors
    return json.loads(printed)
