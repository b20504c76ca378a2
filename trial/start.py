"""Makes train.py start faster and wait politely. No result depends on it.

train.py imports it first. It imports NNI, torch and tqdm itself, because it changes settings that
have to be set before or during those imports.
"""

import gc
import os
import sys
import threading

# A thread of torch that waits for another one spins before it sleeps. By default it spins so long
# that, on a machine with other users, it takes the time that the other thread needs: docs/speed.md
# has the seconds. What the user has set in the environment stays.
set_by_user = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
spin = {} if set_by_user else {"GOMP_SPINCOUNT": "10000"}
os.environ.update(spin)

# While modules load, the garbage collector finds nothing to free, but looks for it 500 times: 0.7
# of 2 s. The modules' objects stay to the end, so the collector need not look at them later either.
gc.disable()
# NNI's json_tricks loads pandas if it is installed, for tables, which no trial reports: 0.2 s and
# 34 MiB. Python does not find a module that is None here.
hidden = sys.modules.setdefault("pandas", None)
import nni

if hidden is None:
    del sys.modules["pandas"]
import torch
from tqdm import tqdm

gc.freeze()
gc.enable()
for name in spin:  # torch has read it, and a process that this one starts may be another program
    del os.environ[name]

# tqdm's own lock serves several processes: in Python 3.14 it would start one more process.
tqdm.set_lock(threading.RLock())
