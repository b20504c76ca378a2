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

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also while a tuner is thinking
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # The manager sends no more than this line before it hears from here.
    config = connection.makefile("rb").readline()
    # From here on as with `python -m nni --exp_params CONFIG`, for the sake of the user's tuner.
    sys.argv[1:] = ["--exp_params", base64.b64encode(config).decode()]
    if not getattr(sys.flags, "safe_path", False):  # Python has put this file's folder there
        sys.path[0] = os.getcwd()
    spec = importlib.util.spec_from_file_location("mends", Path(__file__).with_name("mends.py"))
    mends = importlib.util.module_from_spec(spec)  # not in sys.modules: the name is the user's
    spec.loader.exec_module(mends)
    mends.apply(connection)
    runpy.run_module("nni", run_name="__main__", alter_sys=True)
