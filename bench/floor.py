"""train.py, but every step takes the same batch, which lies on the device as floats: the floor.

What train.py takes above it is the handling of the data. The flags are train.py's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from trial import batch


class FixedBatch:
    """batch.make() with the same answer to every index: the first batch that there is."""

    first = None

    def __call__(self, images, labels, index, pixels):
        if self.first is None:
            size = len(index)
            self.first = batch.normalize(images[:size]), labels[:size]
        return self.first


if __name__ == "__main__":
    batch.make = FixedBatch()
    train.main()
