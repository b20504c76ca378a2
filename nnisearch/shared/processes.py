"""Finds and ends the processes of searches.

A process may end at any moment, be a zombie, or be closed to this user (as by hidepid). No function
here raises for that, and no such process hides the others.
"""

import collections
import contextlib
import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from psutil import Process

from nnisearch.shared.place import namespace


def call(process: Process, method: str):
    """Return what a method of psutil.Process returns; None if the process is gone or closed."""
    with contextlib.suppress(psutil.Error, OSError):  # psutil lets some OSErrors through
        return getattr(process, method)()
    return None


def lives(process: Process) -> bool | None:
    """Return whether a process runs, or None if it cannot be seen; a zombie has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return None


def own_processes() -> list[Process]:
    """Return this user's processes, without zombies and without those in other containers."""

    def is_own(process):
        uids = call(process, "uids")
        return uids and uids.real == os.getuid() and namespace(process.pid) == namespace()

    return [process for process in psutil.process_iter() if is_own(process) and lives(process)]


def with_descendants(processes: Iterable[Process]) -> set[Process]:
    """Return processes with their children, the children of these, and so on, of all users."""
    children = collections.defaultdict(set)
    for process in psutil.process_iter():
        children[call(process, "ppid")].add(process)
    family, newest = set(), set(processes)
    while newest:
        family |= newest
        newest = set().union(*(children[parent.pid] for parent in newest)) - family
    return family


def managers() -> dict[str, Process]:
    """Return {ID: process} of all running managers.

    NNI only checks that a process has the noted PID. This process may be a zombie or, after a
    reboot, another program. So the arguments are read: those of NNI's main.js name the experiment.
    """
    running = {}
    for process in own_processes():
        arguments = call(process, "cmdline") or []
        if any(argument.endswith("nni_node/main.js") for argument in arguments[:5]):
            running[argument_of(process, "--experiment-id")] = process
    return running


def argument_of(process: Process, name: str) -> str | None:
    """Return the value after an argument of a process, or None."""
    return dict(itertools.pairwise(call(process, "cmdline") or [])).get(name)


def manager_of(id: str) -> Process | None:
    """Return the process of the experiment's manager, or None if it does not run."""
    return managers().get(id)


def is_tuner(process: Process) -> bool | None:
    """Return whether nnisearch or nnictl has started a process as a tuner; None if it is closed."""
    arguments = call(process, "cmdline")
    if arguments is None:
        return None
    script = "/nnisearch/manager/dispatcher.py"
    return "--exp_params" in arguments or any(part.endswith(script) for part in arguments)


def processes_of(id: str, folder: Path) -> set[Process]:
    """Return the processes that an experiment's manager has started, with their descendants.

    NNI's variables identify them: a trial's has the experiment's ID, its tuner's the log's folder.
    This process and its parents are left out: a trial may have started the shell that resumes it.
    """
    started = set()
    for process in own_processes():
        environment = call(process, "environ") or {}
        has_log = environment.get("NNI_LOG_DIRECTORY", "").startswith(f"{folder}/")
        if environment.get("NNI_EXP_ID") == id or has_log:
            started.add(process)
    family, ancestor = with_descendants(started), Process()
    while ancestor:
        family.discard(ancestor)
        ancestor = call(ancestor, "parent")
    return family


def end(processes: Iterable[Process]) -> None:
    """End processes as NNI ends trials: by SIGTERM, and by SIGKILL after five seconds."""
    for method in ("terminate", "kill"):
        for process in processes:
            call(process, method)
        last = time.monotonic() + 5
        while (processes := [*filter(lives, processes)]) and time.monotonic() < last:
            time.sleep(0.02)


def stop(pid: int, folder: Path) -> None:
    """End a process with its descendants, and all processes of the experiment in a folder."""
    family = with_descendants(process for process in own_processes() if process.pid == pid)
    end(family | processes_of(folder.name, folder))
