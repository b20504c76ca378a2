"""train.py with the tiny data set: tiny_train.py ARCHIVE PORT [FLAGS]

The disk is so slow that a file takes a minute.
"""

import runpy
import sys
import time
from pathlib import Path

import tiny_cifar10


def write_half(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    print("writing", flush=True)
    time.sleep(60)


tiny_cifar10.expect(Path(sys.argv.pop(1)), sys.argv.pop(1))
Path.write_bytes = write_half
sys.argv[0] = "train.py"
runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"), run_name="__main__")
