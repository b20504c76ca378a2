"""Handles Ctrl-C, SIGTERM and SIGHUP."""

import contextlib
import signal
import sys
from collections.abc import Iterator

ENDING = (signal.SIGTERM, signal.SIGHUP)


def end_by_exit() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit, so that this process cleans up before it ends."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def silently_interrupted() -> Iterator[None]:
    """Let Ctrl-C end this process silently in the block, which imports modules."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of the block."""
    put_off = []
    before = {
        number: signal.signal(number, lambda number, _: put_off.append(number))
        for number in (signal.SIGINT, *ENDING)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if put_off:
            signal.raise_signal(put_off[0])
