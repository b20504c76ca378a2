"""Loads the tiny data set as train.py loads CIFAR-10: load_data.py FOLDER ARCHIVE PORT [USER]"""

import io
import os
import sys
from pathlib import Path

import tiny_cifar10
import torch

from trial import data

folder, archive, port, *user = sys.argv[1:]
tiny_cifar10.expect(Path(archive), port)
torch.save(torch.zeros(1), io.BytesIO())  # imports more, which the other user may not read
for number in user:
    os.setuid(int(number))
print([len(tensor) for tensor in data.load_cifar10(Path(folder))])
