"""What is done before a search is resumed, so that it goes on exactly (pace.js does the rest).

It promises: an experiment counts as running if its manager lives; of one that was killed nothing
runs on beside the trials that are started anew.
"""

from pathlib import Path

from nni.tools.nnictl.config_utils import Experiments

from nnisearch.processes import end, manager_of, managers, processes_of
from nnisearch.results import EXPERIMENTS, read_json


def list_experiments():
    """Return NNI's list, {ID: what it knows}, in which STOPPED is whose manager does not live."""
    listed = EXPERIMENTS.expanduser()
    if listed.exists() and listed.stat().st_size:  # else NNI takes it for empty, and overwrites it
        known = read_json(listed)
        if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
            raise ValueError(f"{listed} is damaged; allowed: an object of experiments, or no file")
    experiments = Experiments()
    alive = managers()
    for id, known in experiments.get_all_experiments().items():
        if known["status"] != "STOPPED" and id not in alive:
            experiments.update_experiment(id, "status", "STOPPED")
    return Experiments().get_all_experiments()


def is_running(known):
    """Return whether an experiment of list_experiments() can be watched, not resumed.

    Raises ValueError if it runs, but in a way that can be neither.
    """
    id, prefix = known["id"], known.get("prefixUrl")
    if known["status"] in ("STOPPED", "ERROR"):  # after an error the manager may live, to no end
        return False
    if known["status"] == "VIEWED":
        does, then = "nnictl view shows it", "it can be resumed"
    elif prefix:
        place = f"http://localhost:{known['port']}/{prefix}"
        does, then = f"it runs at {place}", "it can be resumed, without that prefix"
    else:
        return True
    raise ValueError(f"--resume is {id}, but {does}; allowed: after nnictl stop {id} {then}")


def prepare(known):
    """End what still runs of an experiment that is to be resumed."""
    id = known["id"]
    if known.get("prefixUrl"):
        print(f"It goes on without its URL prefix, {known['prefixUrl']}")
    if known["status"] == "ERROR" and (manager := manager_of(id)):
        end([manager])
    end(processes_of(id, Path(known["logDir"], id)))
    Experiments().update_experiment(id, "status", "STOPPED")  # else NNI does not resume it
