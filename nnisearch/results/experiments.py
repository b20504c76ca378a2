"""NNI's list of experiments, and their folders."""

import json
from pathlib import Path

from nnisearch.results.database import DATABASE

EXPERIMENTS = Path("~/nni-experiments/.experiment")  # NNI's list, {ID: {...}}


def list_path() -> Path:
    """Return the path of NNI's list. Raises ValueError if this user has no home."""
    try:
        return EXPERIMENTS.expanduser()
    except RuntimeError:
        allowed = "a folder of yours; choose.py --file FOLDER reads a search without it"
        raise ValueError(f"HOME is not set; allowed: {allowed}") from None


def read_experiments() -> dict[str, dict]:
    """Return NNI's list of experiments, {ID: entry}.

    Raises OSError if it cannot be read, and ValueError that names it if it is damaged. A power cut
    can empty it.
    """
    listed = list_path()
    if not listed.exists():
        return {}
    content = listed.read_bytes() if listed.is_file() else b"null"  # a pipe would block
    was_emptied = not content and any(listed.parent.glob(f"*/{DATABASE}"))
    try:
        experiments = json.loads(content or "{}")
    except (ValueError, RecursionError):
        experiments = None
    entries = experiments.values() if isinstance(experiments, dict) else [None]
    if was_emptied or not all(map(is_entry, entries)):
        way = f"to continue without it: mv '{listed}' '{listed}.damaged'"
        what = f"{listed} is damaged; allowed: NNI's list of experiments, or no file"
        raise ValueError(f"{what}; {way}; a search is still found by its ID")
    return experiments


def is_entry(entry: object) -> bool:
    """Return whether NNI could have written an entry of its list."""
    values = entry if isinstance(entry, dict) else {}
    return isinstance(values.get("status"), str) and isinstance(values.get("logDir"), str)


def known_ids(experiments: dict[str, dict]) -> str:
    """Return a text with up to five IDs of experiments."""
    words = ", ".join([*experiments][-5:]) or "none, since NNI lists no experiment"
    return words + (", and others in nnictl experiment list --all" if len(experiments) > 5 else "")


def find_folder(id: str, experiments: dict[str, dict]) -> Path | None:
    """Return the folder of an experiment, or None if there is none.

    experiments is NNI's list. If it lacks the experiment, or both have been moved, the folder is
    found beside the list.
    """
    listed = Path(experiments[id]["logDir"], id) if id in experiments else None
    if listed and (listed / DATABASE).is_file():
        return listed
    beside = list_path().with_name(Path(id).name)
    is_beside = beside.name == id and (beside / DATABASE).is_file()
    return beside if is_beside else listed


def find_database(id: str | None) -> Path:
    """Return the path of an experiment's database, by default of the latest experiment.

    Raises ValueError if there is no such experiment, OSError if NNI's list cannot be read.
    """
    if id and (folder := find_folder(id, {})):
        return folder / DATABASE
    experiments = read_experiments()
    if not experiments:
        none = f"no experiment: {list_path()} lists none"
        raise ValueError(f"{none}; --file reads a search's folder, too")
    if id is None:
        id = max(experiments, key=lambda id: experiments[id].get("startTime", 0))
    if folder := find_folder(id, experiments):
        return folder / DATABASE
    raise ValueError(f"EXPERIMENT_ID is {id!r}; allowed: {known_ids(experiments)}")
