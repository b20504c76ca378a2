"""Finds and ends the processes of searches."""

import contextlib
import itertools
import os
import time

import psutil

from nnisearch.shared.place import namespace


def own_processes():
    """Return this user's processes, without zombies and without those in other containers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            is_own = process.uids().real == os.getuid() and namespace(process.pid) == namespace()
            if is_own and lives(process):
                found.append(process)
    return found


def managers():
    """Return {ID: process} of all running managers.

    NNI only checks that a process has the noted PID. This process may be a zombie or, after a
    reboot, another program. So the arguments are read: those of NNI's main.js name the experiment.
    """
    found = {}
    for process in own_processes():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if any(argument.endswith("nni_node/main.js") for argument in arguments[:5]):
                found[argument_of(process, "--experiment-id")] = process
    return found


def argument_of(process, name):
    """Return the value after an argument of a process, or None. Raises psutil.Error."""
    return dict(itertools.pairwise(process.cmdline())).get(name)


def manager_of(id):
    """Return the process of the experiment's manager, or None if it does not run."""
    return managers().get(id)


def is_tuner(process):
    """Return whether a process is a tuner that nnisearch or nnictl has started."""
    arguments = process.cmdline()
    return "--exp_params" in arguments or any(
        part.endswith("/nnisearch/manager/dispatcher.py") for part in arguments
    )


def processes_of(id, folder):
    """Return the processes that an experiment's manager has started, with their descendants.

    NNI's variables and paths in the experiment's folder identify them. This process and its
    parents are left out: a trial of the search may have started the shell that resumes it.
    """
    found = set()
    for process in own_processes():
        with contextlib.suppress(psutil.Error):
            environment, arguments = process.environ(), process.cmdline()
            is_trial = environment.get("NNI_EXP_ID") == id
            is_tried = environment.get("NNI_SYS_DIR", "").startswith(f"{folder}/")
            script = arguments[1] if arguments[:1] == ["bash"] and arguments[1:] else ""
            is_shell = script.startswith(f"{folder}/") and script.endswith("/run.sh")
            is_tuner = environment.get("NNI_LOG_DIRECTORY", "").startswith(f"{folder}/")
            is_gpu_collector = environment.get("METRIC_OUTPUT_DIR", "").startswith(f"{folder}/")
            if is_trial or is_tried or is_shell or is_tuner or is_gpu_collector:
                found |= {process, *process.children(recursive=True)}
    this = psutil.Process()
    return found - {this, *this.parents()}


def end(processes):
    """End processes as NNI ends trials: by SIGTERM, and by SIGKILL after five seconds."""
    for how in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                how(process)
        last = time.monotonic() + 5
        while (processes := [*filter(lives, processes)]) and time.monotonic() < last:
            time.sleep(0.02)


def lives(process):
    """Return whether a process runs; a zombie has ended."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def stop(pid, folder):
    """End a process and all its descendants, even if the process itself has ended before.

    Descendants are found by the process's session or, if they have left it, by the experiment's
    folder in their environment.
    """
    family = processes_of(folder.name, folder)
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family |= {parent, *parent.children(recursive=True)}
    for process in own_processes():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == pid:
                family.add(process)
    end(family)
