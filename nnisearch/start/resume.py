"""Finds an experiment, and prepares it to be resumed; manager.js then restores its exact state.

An experiment counts as running if its manager lives. If the manager was killed, the experiment's
remaining processes are ended before trials start again.
"""

import contextlib
import time
from pathlib import Path

from nni.experiment import rest

from nnisearch.before.config import from_stored
from nnisearch.results.experiments import find_folder, known_ids, read_experiments
from nnisearch.shared.place import runs_on_other_host
from nnisearch.shared.processes import argument_of, end, manager_of, managers, processes_of
from nnisearch.shared.text import one_line
from nnisearch.start.patches import Experiments

STOPPING = 10  # s: a stopped manager ends soon after NNI's list says so


def list_experiments():
    """Return NNI's list, {ID: entry}; the status is STOPPED if the manager does not live.

    An experiment on another machine, or in another container, keeps its status. Raises OSError or
    ValueError if the list is damaged: NNI would treat it as empty, and overwrite it.
    """
    listed = read_experiments()
    alive = managers()
    for id, entry in listed.items():
        if id not in alive and not runs_on_other_host(Path(entry["logDir"], id)):
            entry["status"] = "STOPPED"
    return listed


def find(id, listed, flag):
    """Return an experiment's entry as in list_experiments(), even if NNI's list has lost it.

    Raises ValueError that names the flag if there is no such experiment.
    """
    folder = find_folder(id, listed)
    if not folder or folder.is_symlink():  # NNI's link _latest
        raise ValueError(f"{flag} is {id!r}; allowed: {known_ids(listed)}")
    manager = manager_of(id)
    entry = {"status": "RUNNING" if manager else "STOPPED"} | listed.get(id, {})
    entry |= {"id": id, "logDir": str(folder.parent)}
    if manager:
        entry["port"] = int(argument_of(manager, "--port"))
    return entry


def close_list(home):
    """Close NNI's folder below HOME, and its list of experiments, to other users."""
    for path in (home, home / ".experiment"):
        with contextlib.suppress(OSError):  # it does not exist, or belongs to another user
            path.chmod(path.stat().st_mode & 0o700)


def is_running(entry):
    """Return whether an experiment runs, so that it is watched; otherwise it is resumed.

    Raises ValueError if it runs but cannot be watched.
    """
    id, prefix = entry["id"], entry.get("prefixUrl")
    if where := runs_on_other_host(Path(entry["logDir"], id)):
        raise ValueError(f"--resume is {id}; allowed: one that runs here, or not at all; {where}")
    if entry["status"] in ("STOPPED", "ERROR"):  # after an error the manager may stay, but is idle
        return False
    if entry["status"] != "VIEWED" and not prefix:
        return True
    does = f"it runs at http://localhost:{entry['port']}/{prefix}" if prefix else "it is only shown"
    raise ValueError(f"--resume is {id}, but {does}; allowed: after nnictl stop {id}")


def running_config(entry):
    """Return the configuration of a running experiment, from its manager.

    Raises ValueError if the manager does not answer, for example because a signal has stopped it.
    """
    id = entry["id"]
    try:
        params = rest.get(entry["port"], "/experiment")["params"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pid = manager.pid if (manager := manager_of(id)) else entry.get("pid")
        ways = f"kill -CONT {pid} if it is stopped, or kill -9 {pid} and this again"
        why = f"its manager, process {pid}, does not answer: {one_line(error)}"
        raise ValueError(f"--resume is {id}; allowed: one that answers; {why}; {ways}") from None
    return from_stored(params, f"experiment {id}")


def clear(experiment):
    """Make sure that a stored experiment does not run; the lock of starts must be held.

    Before a resume, end what a killed manager has left. Raises ValueError if a manager runs, for
    example because another command has just resumed it.
    """
    id, action = experiment.id, experiment.action
    status = read_experiments().get(id, {}).get("status")
    patience = time.monotonic() + STOPPING
    while (manager := manager_of(id)) and status == "STOPPED" and time.monotonic() < patience:
        time.sleep(0.1)
    if manager and (action == "view" or status != "ERROR"):
        allowed = f"one that does not run; its manager is process {manager.pid}"
        raise ValueError(f"--{action} is {id}; allowed: {allowed}")
    if action == "resume":
        end([manager] if manager else [])
        for _ in range(2):  # twice: they may have started others meanwhile
            end(processes_of(id, experiment.folder))
    Experiments().update_experiment(id, "status", "STOPPED")  # otherwise NNI refuses
