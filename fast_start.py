"""What train.py imports first, to start faster and to get on with others. No result depends on it.

It imports NNI, torch and tqdm itself, because what it sets has to be set before or during that.
"""

import gc
import os
import sys
import threading

# A thread of torch that waits for another one spins before it sleeps: by default for so long that,
# on a machine which others use as well, it takes the time that the other thread is waiting for.
# docs/speed.md has the seconds. What the user has set in the environment stays.
is_users = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
spin = {} if is_users else {"GOMP_SPINCOUNT": "10000"}
os.environ.update(spin)

# While modules load, the garbage collector finds nothing to free, and would look for it 500 times:
# 0.7 of 2 s. What they have made stays to the end, so it need not be looked at later, either.
gc.disable()
# NNI's json_tricks loads pandas if it is installed, for tables, which no trial reports: 0.2 s and
# 34 MiB. A module that is None is not found.
hidden = sys.modules.setdefault("pandas", None)
import nni

if hidden is None:
    del sys.modules["pandas"]
import torch
from tqdm import tqdm

gc.freeze()
gc.enable()
for name in spin:  # torch has read it, and what this process starts may be something else
    del os.environ[name]

# By default, tqdm makes a lock for several processes, which in Python 3.14 starts one more of them.
tqdm.set_lock(threading.RLock())
