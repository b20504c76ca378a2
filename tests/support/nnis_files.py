"""A search's files as NNI 2.10.1 writes them, for tests that read them without a search."""

import contextlib
import json
import sqlite3

TABLES = """
CREATE TABLE TrialJobEvent (timestamp integer, trialJobId text, event text, data text,
    logPath text, sequenceId integer, message text);
CREATE TABLE MetricData (timestamp integer, trialJobId text, parameterId text, type text,
    sequence integer, data text);
CREATE TABLE ExperimentProfile (params text, id text, execDuration integer, startTime integer,
    endTime integer, logDir text, nextSequenceId integer, revision integer);
"""
EVENT = "INSERT INTO TrialJobEvent VALUES (?,?,?,?,NULL,?,NULL)"
METRIC = "INSERT INTO MetricData VALUES (0,?,?,?,?,?)"
PROFILE = "INSERT INTO ExperimentProfile VALUES (?,?,0,0,NULL,'',0,?)"


def trial(number, result, seconds=10.0, reports=(2.0, 1.0), status="SUCCEEDED", **hyperparameters):
    """Return a trial as choose.py prints it with --json."""
    return {
        "trial": number,
        "id": f"id{number}",
        "status": status,
        "result": result,
        "seconds": seconds,
        "intermediate": list(reports),
        "hyperparameters": {"lr": 0.01 * (number + 1)} | hyperparameters,
    }


def database(home, trials, experiment="abc123", start=1000, **profile):
    """Write a search's database and its entry in NNI's list; return the database's path."""
    path = home / "nni-experiments" / experiment / "db" / "nni.sqlite"
    path.parent.mkdir(parents=True)
    listed = home / "nni-experiments" / ".experiment"
    experiments = json.loads(listed.read_text()) if listed.exists() else {}
    folder = str(home / "nni-experiments")
    experiments[experiment] = {"startTime": start, "logDir": folder, "status": "STOPPED"}
    listed.write_text(json.dumps(experiments))
    tuner = {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}
    params = {"experimentName": "a search", "trialCommand": "python3 train.py", "tuner": tuner}
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(TABLES)
        for revision in (1, 2):
            connection.execute(PROFILE, (json.dumps(params | profile), experiment, revision))
        for entry in trials:
            write_trial(connection, entry)
    return path


def write_trial(connection, entry):
    """Write the events of a trial and what it has reported."""
    name, number = entry["id"], entry["trial"]
    proposed = json.dumps({"parameter_id": number, "parameters": entry["hyperparameters"]})
    connection.execute(EVENT, (5, "", "ADD_CUSTOMIZED", "{}", None))
    connection.execute(EVENT, (1000, name, "WAITING", proposed, number))
    if entry["seconds"] is not None:
        connection.execute(EVENT, (2000, name, "RUNNING", None, number))
        if entry["status"] != "RUNNING":
            end = 2000 + round(1000 * entry["seconds"])
            connection.execute(EVENT, (end, name, entry["status"], None, number))
    reports = [("PERIODICAL", *report) for report in enumerate(entry["intermediate"])][::-1]
    if entry["result"] is not None:
        reports.append(("FINAL", 0, entry["result"]))
    for kind, sequence, value in reports:
        text = json.dumps(json.dumps(value))
        connection.execute(METRIC, (name, str(number), kind, sequence, text))
