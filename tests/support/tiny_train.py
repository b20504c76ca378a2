"""train.py with the tiny data set: tiny_train.py ARCHIVE PORT [FLAGS]

The disk is so slow that half a file takes a minute.
"""

import runpy
import sys
import time
from pathlib import Path

import tiny_cifar10
import torch


def half_written(content, file):
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)


tiny_cifar10.expect(Path(sys.argv.pop(1)), sys.argv.pop(1))
torch.save = half_written
sys.argv[0] = "train.py"
runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"), run_name="__main__")
