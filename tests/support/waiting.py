"""How tests wait for what another process does."""

import time


def wait_for(condition):
    """Wait until the condition holds, however busy the machine is, and return what it returned."""
    end = time.monotonic() + 240
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found
