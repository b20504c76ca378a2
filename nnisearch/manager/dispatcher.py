"""Runs the tuner's process: `python -m nni` with fixes, connected only to the search's manager.

    python dispatcher.py FD

FD is one end of a socket pair; the manager holds the other end. The manager first sends the
configuration, one line of JSON. Then the pair replaces NNI's connection to the manager's port. So
no other process can act as the manager, ps does not show the configuration, and this process ends
with the manager.
"""

import base64
import ctypes
import importlib.util
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2)


def load(path):
    """Return the module in a file, without sys.modules, where it could hide a user's module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if sys.platform == "linux":  # end with the manager, even during a long computation
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # Nothing after this line gets into the buffer, because the manager waits for an answer.
    config = connection.makefile("rb").readline()
    # The user's tuner finds the same arguments and path as in `python -m nni --exp_params CONFIG`.
    sys.argv[1:] = ["--exp_params", base64.b64encode(config).decode()]
    if not getattr(sys.flags, "safe_path", False):  # Python has put this file's folder first
        sys.path[0] = os.getcwd()
    imports = load(Path(__file__).parents[1] / "shared" / "imports.py")
    with imports.without_pandas():
        fixes = load(Path(__file__).with_name("fixes.py"))
    fixes.apply(connection)
    runpy.run_module("nni", run_name="__main__", alter_sys=True)
