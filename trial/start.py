"""Makes train.py start faster, and leaves CPU time to others. No result depends on it.

train.py imports this file first. This file imports NNI, torch and tqdm, because its settings have
to be in place before or during those imports.
"""

import gc
import os
import sys
import threading

# A thread of torch that waits for another thread first spins (a busy loop), then sleeps. On a
# machine with other users, the default spins for so long that the other thread gets too little CPU
# time (docs/speed.md has figures). Settings in the user's environment stay.
set_by_user = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
spin = {} if set_by_user else {"GOMP_SPINCOUNT": "10000"}
os.environ.update(spin)

# While modules load, the garbage collector runs 500 times and finds nothing: 0.7 of 2 s. The
# modules' objects stay until the end. gc.freeze() excludes them from later runs, too.
gc.disable()
# NNI's json_tricks loads pandas if it is installed: 0.2 s and 34 MiB. It needs pandas only to
# report tables, which no trial does. Python does not find a module that is None in sys.modules.
hidden = sys.modules.setdefault("pandas", None)
import nni

if hidden is None:
    del sys.modules["pandas"]
import torch
from tqdm import tqdm

gc.freeze()
gc.enable()
for name in spin:  # torch has read it; child processes must not inherit it
    del os.environ[name]

# By default, tqdm makes a lock for several processes, which starts a process in Python 3.14.
tqdm.set_lock(threading.RLock())
