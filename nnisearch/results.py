"""A search as a table, from NNI's database or a file: the one reader of results for all."""

import json
import math
import sqlite3
from pathlib import Path

import pandas

EXPERIMENTS = Path("~/nni-experiments/.experiment")  # NNI's list of them: {ID: {...}}
EVENTS = (
    "SELECT trialJobId AS id, sequenceId, event, timestamp, data FROM TrialJobEvent WHERE event"
    " NOT IN ('ADD_CUSTOMIZED', 'ADD_HYPERPARAMETER', 'IMPORT_DATA') ORDER BY rowid"
)
METRICS = "SELECT trialJobId AS id, type, data FROM MetricData ORDER BY sequence"
PROFILE = "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"


def finite(value):
    """Return value, of JSON or text, as a finite number, or None where it is none."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def find_database(experiment):
    """Return the ID and the database of an experiment of this user, by default the latest.

    Raises ValueError if there is no such experiment, OSError if NNI's list cannot be read.
    """
    listed = EXPERIMENTS.expanduser()
    known = read_json(listed) if listed.exists() else {}
    if not known:
        raise ValueError(f"no experiment: {listed} lists none; --file reads exported results")
    if experiment is None:
        experiment = max(known, key=lambda key: known[key]["startTime"])
    if experiment not in known:
        raise ValueError(f"EXPERIMENT_ID is {experiment!r}; allowed: {', '.join(sorted(known))}")
    return experiment, Path(known[experiment]["logDir"]) / experiment / "db" / "nni.sqlite"


def read_database(experiment, path):
    """Return the search in NNI's database, in the form that --json prints.

    Raises OSError, naming it, if it is no database of NNI 2.10 or stays locked for 5 seconds.
    """
    try:
        # Read-only, so that nothing is written beside NNI and a missing file is not created.
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            profile = json.loads(database.execute(PROFILE).fetchone()[0])
            events, metrics = (pandas.read_sql(query, database) for query in (EVENTS, METRICS))
        finally:
            database.close()
        metrics["value"] = [finite(json.loads(json.loads(data))) for data in metrics["data"]]
        trials = []
        for id, rows in events.groupby("id", sort=False):
            is_start = rows["event"].isin(["WAITING", "RUNNING"])  # RUNNING may be missed by NNI
            start, end = rows[is_start]["timestamp"].max(), rows[~is_start]["timestamp"].max()
            given = json.loads(rows[rows["event"] == "WAITING"]["data"].iloc[-1])
            reported = metrics[metrics["id"] == id].astype(object).where(lambda x: x.notna(), None)
            finals = reported[reported["type"] == "FINAL"]["value"].tolist()
            trials.append(
                {
                    "trial": int(rows["sequenceId"].iloc[0]),
                    "id": id,
                    "status": rows["event"].iloc[-1],
                    "accuracy": finals[-1] if finals else None,
                    "losses": reported[reported["type"] != "FINAL"]["value"].tolist(),
                    "hyperparameters": given["parameters"],
                    "seconds": finite((end - start) / 1000),
                }
            )
            measure(trials[-1])
    except (sqlite3.Error, pandas.errors.DatabaseError, KeyError, TypeError) as error:
        raise OSError(f"cannot read {path}: {error.__cause__ or error}") from error
    name, command = profile.get("experimentName"), profile.get("trialCommand")
    return {"experiment": experiment, "name": name, "command": command, "trials": trials}


def read_file(path):
    """Return the search in a file, which --json or nnictl's export has written.

    nnictl exports only the trials with a result, without durations, and the losses only with -i.
    Raises OSError or ValueError, naming the file, if it is neither.
    """
    search = read_json(path)
    try:
        if not isinstance(search, dict):
            trials = [
                {
                    "trial": number,
                    "id": trial["trialJobId"],
                    "status": "SUCCEEDED",
                    "accuracy": finite(trial["value"]),
                    "losses": [finite(loss) for loss in trial.get("intermediate", [])[:-1]],
                    "hyperparameters": trial["parameter"],
                    "seconds": None,
                }
                for number, trial in enumerate(search)
            ]
            search = {"experiment": None, "name": path.name, "command": None, "trials": trials}
        search = {key: search[key] for key in ("experiment", "name", "command", "trials")}
        for trial in search["trials"]:
            measure(trial)
        return search
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results of --json or nnictl: {reason}") from error


def measure(trial):
    """Add to a trial its final loss and the area under its loss curve, over a width of 1.

    The area is the mean of the losses, because each is the mean of its part of the trial.
    """
    losses = trial["losses"]
    trial["final_loss"] = losses[-1] if losses else None
    trial["area"] = sum(losses) / len(losses) if losses and None not in losses else None


def read_json(path):
    """Return what the JSON file holds. Raises OSError or ValueError, naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
