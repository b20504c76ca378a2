"""Imports train.py, trains in each way from a cache, and checks what was imported.

lean_imports.py FOLDER     # which holds the cache
"""

import gc
import sys

import train
from trial import data, optimizers

for output in (sys.stdout, sys.stderr):
    print("imported", file=output, flush=True)  # and nothing before
assert gc.isenabled()

source = ["--data-dir", sys.argv[1]]
for schedule in optimizers.LR_SCHEDULES:
    for optimizer in optimizers.OPTIMIZERS:
        train.main([*source, "--epochs=1", f"--lr-schedule={schedule}", f"--optimizer={optimizer}"])
data.make_synthetic()
# torch.compile takes a second and 140 MiB, pandas and torchvision each about a second.
assert not {"torch._dynamo", "pandas", "torchvision"} & set(sys.modules)
