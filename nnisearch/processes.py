"""Processes of searches: which live, and how they are ended."""

import contextlib

import psutil


def stop(pid):
    """End a process and all that it has started, as NNI does: in five seconds at most."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
        for how in (psutil.Process.terminate, psutil.Process.kill):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    how(member)
            _, family = psutil.wait_procs(family, timeout=5)
