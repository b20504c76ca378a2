"""A trial that reports some numbers. In its middle it waits until the test lets it pass."""

import os
import time
from pathlib import Path

REPORTS = 5


def let_pass(home, number):
    """Let the first trials of the search with this HOME come to their end."""
    for trial in range(number):
        (home / f"pass{trial}").touch()


if __name__ == "__main__":
    from other_project import report

    sign = Path.home() / f"pass{os.environ['NNI_TRIAL_SEQ_ID']}"
    for number in range(REPORTS):
        report("PERIODICAL", number, number)
        while number == REPORTS // 2 and not sign.exists():
            time.sleep(0.1)
    report("FINAL", 0.5)
