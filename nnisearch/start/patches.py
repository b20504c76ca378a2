"""Changes NNI's Python code for the launcher's process, each change with its reason."""

import contextlib
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from nni.experiment import launcher, rest
from nni.tools.nnictl import common_utils, config_utils
from nni.tools.nnictl.config_utils import Experiments

from nnisearch.results.experiments import read_experiments
from nnisearch.shared.output import write
from nnisearch.shared.signals import uninterrupted
from nnisearch.shared.text import one_line

NOTICE = 5  # s until the user is told what the command waits for
PATIENCE = 120  # s for NNI's web server; NNI waits for 3


class WaitingAloud:
    """Lets a lock of filelock print, after NOTICE seconds, what it waits for."""

    def acquire(self, *_, **__):
        """Wait for the lock, without a time limit."""
        try:
            return super().acquire(timeout=NOTICE)
        except Timeout:
            print(f"Waiting for {self.holder.format(one_line(self.lock_file))}")
            return super().acquire(timeout=-1)


class StartLock(WaitingAloud, FileLock):
    """The lock of a command that starts a search."""

    holder = "another start, maybe one stopped by Ctrl-Z; to see it: fuser -v {}"


class ListLock(WaitingAloud, common_utils.SimplePreemptiveLock):
    """NNI's lock on its list: a file whose name ends with a PID, at most two seconds old.

    A date in the future counts as new.
    """

    holder = "the process whose number ends the name of a lock; if it has ended: rm {}.*"


def write_list(experiments):
    """Write NNI's list of experiments in one step. If that fails, the old list stays.

    NNI empties the file and then writes it: if NNI is killed in between, the list is lost.
    """
    with contextlib.suppress(OSError):
        content = json.dumps(experiments.experiments, indent=4)
        write(Path(experiments.experiment_file), content.encode(), mode=0o600)


Experiments.write_file = write_list
# NNI lets its manager keep the terminal open as its input: a pseudo-terminal would not close.
launcher.Popen = functools.partial(subprocess.Popen, stdin=subprocess.DEVNULL)
# NNI's own function runs code that the list names by __symbol__.
Experiments.read_file = lambda _: read_experiments()
config_utils.get_file_lock = lambda path, stale: ListLock(f"{path}.lock", stale)


@contextlib.contextmanager
def without_warnings():
    """Hide Python 3.14's warnings about files that NNI leaves open on a full disk."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def patience():
    """Let NNI wait for its web server while the server's process lives, at most PATIENCE seconds.

    NNI has no setting for that. Yields the list of processes that NNI has started in the block.
    """
    started = []
    start, wait, timeout = launcher._start_rest_server, launcher._check_rest_server, rest.timeout

    def start_and_note(*args):
        # Uninterrupted: otherwise the list could miss a running process.
        with uninterrupted(), without_warnings():
            started.append(start(*args))
        return started[-1]

    def wait_for_server(port, **_):
        server = psutil.Process(started[-1].pid)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and started[-1].poll() is None:
            with contextlib.suppress(psutil.Error):
                ports = server.net_connections("tcp4")  # opened after the IPv6 port (access.js)
                listening = [c.laddr.port for c in ports if c.status == "LISTEN"]
                if port in listening:  # our own server, not another user's
                    return
            time.sleep(0.1)
        state = "has ended" if started[-1].poll() is not None else f"is silent after {PATIENCE} s"
        raise RuntimeError(f"NNI's web server {state}")

    launcher._start_rest_server, launcher._check_rest_server = start_and_note, wait_for_server
    rest.timeout = PATIENCE
    try:
        yield started
    finally:
        launcher._start_rest_server, launcher._check_rest_server = start, wait
        rest.timeout = timeout
