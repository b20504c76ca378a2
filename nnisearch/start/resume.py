"""Finds an experiment, and prepares it to be resumed; pace.js then restores its exact state.

An experiment counts as running if its manager lives. If the manager was killed, the experiment's
remaining processes are ended before trials start again.
"""

import contextlib
from pathlib import Path

from nni.experiment import rest

from nnisearch.before.config import from_stored
from nnisearch.results.experiments import find_folder, known_ids, read_experiments
from nnisearch.shared.place import elsewhere
from nnisearch.shared.processes import argument_of, end, manager_of, managers, processes_of
from nnisearch.shared.text import one_line
from nnisearch.start.patches import Experiments


def list_experiments():
    """Return NNI's list, {ID: entry}; the status is STOPPED if the manager does not live.

    An experiment on another machine, or in another container, keeps its status. Raises OSError or
    ValueError if the list is damaged: NNI would treat it as empty, and overwrite it.
    """
    listed = read_experiments()
    alive = managers()
    for id, known in listed.items():
        is_here = id in alive or known["status"] == "STOPPED"
        if not is_here and not elsewhere(Path(known["logDir"], id)):
            known["status"] = "STOPPED"
    return listed


def find(id, listed, flag):
    """Return an experiment's entry as in list_experiments(), even if NNI's list has lost it.

    Raises ValueError that names the flag if there is no such experiment.
    """
    folder = find_folder(id, listed)
    if not folder or folder.is_symlink():  # NNI's link _latest
        raise ValueError(f"{flag} is {id!r}; allowed: {known_ids(listed)}")
    manager = manager_of(id)
    known = {"id": id, "status": "RUNNING" if manager else "STOPPED"} | listed.get(id, {})
    known["logDir"] = str(folder.parent)
    if manager:
        known["port"] = int(argument_of(manager, "--port"))
    return known


def close_list(home):
    """Close NNI's folder below HOME, and its list of experiments, to other users."""
    for path in (home, home / ".experiment"):
        with contextlib.suppress(OSError):  # it does not exist, or belongs to another user
            path.chmod(path.stat().st_mode & 0o700)


def note_ended(listed):
    """Write to NNI's list which experiments of list_experiments() are STOPPED."""
    experiments = Experiments()
    for id, known in experiments.get_all_experiments().items():
        if known["status"] != "STOPPED" and listed.get(id, known)["status"] == "STOPPED":
            experiments.update_experiment(id, "status", "STOPPED")


def is_running(known):
    """Return whether an experiment runs, so that it is watched; otherwise it is resumed.

    known is its entry. Raises ValueError if it runs but cannot be watched.
    """
    id, prefix = known["id"], known.get("prefixUrl")
    if where := elsewhere(Path(known["logDir"], id)):
        raise ValueError(f"--resume is {id}; allowed: one that runs here, or not at all; {where}")
    if known["status"] in ("STOPPED", "ERROR"):  # after an error the manager may stay, but is idle
        return False
    if known["status"] == "VIEWED":
        does, then = "it is only shown, by --view or nnictl view", "it can be resumed"
    elif prefix:
        place = f"http://localhost:{known['port']}/{prefix}"
        does, then = f"it runs at {place}", "it can be resumed, without that prefix"
    else:
        return True
    raise ValueError(f"--resume is {id}, but {does}; allowed: after nnictl stop {id} {then}")


def running_config(known):
    """Return the configuration of a running experiment, from its manager.

    Raises ValueError if the manager does not answer, for example because a signal has stopped it.
    """
    id = known["id"]
    try:
        params = rest.get(known["port"], "/experiment")["params"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pid = manager_of(id).pid if manager_of(id) else known.get("pid")
        ways = f"kill -CONT {pid} if it is stopped, or kill -9 {pid} and this again"
        why = f"its manager, process {pid}, does not answer: {one_line(error)}"
        raise ValueError(f"--resume is {id}; allowed: one that answers; {why}; {ways}") from None
    return from_stored(params, f"experiment {id}")


def prepare(known):
    """End the remaining processes of an experiment that is to be resumed."""
    id = known["id"]
    if known.get("prefixUrl"):
        print(f"It continues without its URL prefix, {known['prefixUrl']}")
    if known["status"] == "ERROR" and (manager := manager_of(id)):
        end([manager])
    folder = Path(known["logDir"], id)
    for _ in range(2):  # twice: they may have started others meanwhile
        end(processes_of(id, folder))
    Experiments().update_experiment(id, "status", "STOPPED")  # otherwise NNI does not resume it
