"""The signals by which a user ends a command, and what they must not interrupt."""

import contextlib
import signal
import sys

ENDING = (signal.SIGTERM, signal.SIGHUP)


def end_by_exit():
    """Let a signal that ends this process raise SystemExit, so that it tidies up first."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def silently_interrupted():
    """Let Ctrl-C end this process without a word while what stands in the block is imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def uninterrupted():
    """Put off Ctrl-C and the signals of ENDING until what stands in the block is done."""
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
