"""Reads a search from a folder, a database, or JSON of choose.py --json or of nnictl."""

import json
from pathlib import Path

from nnisearch.results.database import DATABASE, read_database
from nnisearch.results.trials import MALFORMED, Trial, duration, number, read_result
from nnisearch.shared.direction import DIRECTIONS
from nnisearch.shared.text import one_line


def read_file(path: Path) -> dict:
    """Return the search in an experiment's folder, NNI's database, or JSON of --json or nnictl.

    nnictl only exports trials with a result, without duration and direction; intermediate results
    need its -i. Raises OSError or ValueError that names the file.
    """
    path = path / DATABASE if path.is_dir() else path
    if path.suffix == DATABASE.suffix:
        return read_database(path)
    search = read_json(path)
    try:
        is_export = not isinstance(search, dict)
        about = {"experiment": None, "name": path.name, "command": None} if is_export else search
        read = {key: about[key] for key in ("experiment", "name", "command")}
        read["direction"] = about.get("direction")
        if read["direction"] not in (None, *DIRECTIONS):
            raise ValueError(f"direction is {read['direction']!r}; allowed: {[*DIRECTIONS]}")
        if is_export:
            trials = [exported(order, entry) for order, entry in enumerate(search)]
        else:
            trials = [imported(entry) for entry in search["trials"]]
        return read | {"trials": trials}
    except MALFORMED as error:
        is_missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if is_missing else f"{type(error).__name__}: {error}"
        what = f"{path} holds no results of --json or of nnictl's export as JSON"
        raise ValueError(f"{what}: {one_line(reason)}") from error


def exported(order: int, entry: dict) -> Trial:
    """Return the trial in an entry of nnictl's export, whose results are JSON in JSON.

    In NNI 1 the key of its ID is "id", and a result may be plain JSON.
    """
    result, reported = read_result(entry["value"])
    # The last intermediate one repeats the result.
    reports = [read_result(text)[0] for text in entry.get("intermediate", [])[:-1]]
    id = str(entry["trialJobId"] if "trialJobId" in entry else entry["id"])
    return Trial(order, id, "SUCCEEDED", result, reported, reports, entry["parameter"])


def imported(entry: dict) -> Trial:
    """Return the trial in an entry of --json, with values of the right types."""
    return Trial(
        int(entry["trial"]),
        str(entry["id"]),
        str(entry["status"]),
        number(entry["result"]),
        entry.get("reported"),
        [number(value) for value in entry["intermediate"]],
        entry["hyperparameters"],
        duration(number(entry["seconds"])),
    )


def read_json(path: Path) -> object:
    """Return the content of a JSON file. Raises OSError or ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
