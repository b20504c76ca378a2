"""The lock of a command that starts a search, and the lock of NNI's list of experiments.

Both say after some seconds what they wait for.
"""

import contextlib
import fcntl
import time
from pathlib import Path

from filelock import Timeout
from nni.tools.nnictl import common_utils

from nnisearch.shared.text import one_line

NOTICE = 5  # s until the user is told what the command waits for
START_LOCK = Path("~/nni-experiments/.nnisearch.lock")  # one start at a time, per user


@contextlib.contextmanager
def held(file):
    """Hold the lock of starts, an open file, in the block.

    A process that has inherited the file holds it, too: if this process is killed, the watchdog
    has the lock until it has undone the start.
    """
    notice = time.monotonic() + NOTICE
    while not take(file):
        if time.monotonic() > notice:
            seen = f"fuser -v {START_LOCK}"
            print(f"Waiting for another start, maybe one stopped by Ctrl-Z; to see it: {seen}")
            notice = float("inf")
        time.sleep(0.05)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def take(file):
    """Take the lock of starts; return whether it was free."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class ListLock(common_utils.SimplePreemptiveLock):
    """NNI's lock on its list: a file whose name ends with a PID, at most two seconds old.

    A date in the future counts as new.
    """

    def acquire(self, *_, **__):
        """Wait for the lock, without a time limit."""
        try:
            return super().acquire(timeout=NOTICE)
        except Timeout:
            file = one_line(self.lock_file)
            holder = f"the process whose number ends the name of a lock; if it has ended: rm {file}"
            print(f"Waiting for {holder}.*")
            return super().acquire(timeout=-1)
