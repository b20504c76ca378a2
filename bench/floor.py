"""train.py, but every step takes the same batch, which lies on the device as floats: the floor.

What train.py takes above it is the handling of the data. The flags are train.py's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import step
import train


class FixedBatch:
    """step.make_batch() with the same answer to every index: the first batch that there is."""

    batch = None

    def __call__(self, images, labels, index, pixels):
        if self.batch is None:
            size = len(index)
            self.batch = step.normalize(images[:size]), labels[:size]
        return self.batch


if __name__ == "__main__":
    step.make_batch = FixedBatch()
    train.main()
