"""The tuner's process: `python -m nni` with mends, connected to its manager and to nobody else.

    python dispatcher.py FD

FD is one end of a pair of sockets. The manager holds the other end. It sends the configuration, a
line of JSON, and then serves the connection that NNI would make to the manager's port. So nobody
can pose as the manager, ps shows no configuration, and this process ends with the manager.
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
    """Return the module in a file. It is not in sys.modules: all names are the user's."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if sys.platform == "linux":  # also while the tuner is thinking
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # The manager sends no more than this line before it hears from here.
    config = connection.makefile("rb").readline()
    # From here on as with `python -m nni --exp_params CONFIG`, for the sake of the user's tuner.
    sys.argv[1:] = ["--exp_params", base64.b64encode(config).decode()]
    if not getattr(sys.flags, "safe_path", False):  # Python has put this file's folder there
        sys.path[0] = os.getcwd()
    imports = load(Path(__file__).parents[1] / "shared" / "imports.py")
    with imports.without_pandas():
        mends = load(Path(__file__).with_name("mends.py"))
    mends.apply(connection)
    runpy.run_module("nni", run_name="__main__", alter_sys=True)
