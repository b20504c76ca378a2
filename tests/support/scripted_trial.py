"""A trial that runs the Python code that its tuner has chosen."""

import functools
import itertools
import os
import signal
import time
from pathlib import Path

import other_project

tell = functools.partial(other_project.report, "FINAL")
order = itertools.count()


def report(value):
    other_project.report("PERIODICAL", value, next(order))


def wait_for(name):
    """Wait for a file that the test writes."""
    while not Path(name).exists():
        time.sleep(0.1)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    exec(other_project.GIVEN["parameters"]["do"])
