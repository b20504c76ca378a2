"""train.py, where 30 MB of memory are left for the training."""

import resource
import sys
from pathlib import Path

import train

addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, [addresses + 30_000_000] * 2)
train.main(sys.argv[1:])
