"""choose.py: the rule, what it reads, what it leaves out, what it writes and what it refuses."""

import csv
import io
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from nnisearch import choose


def trial(number, accuracy, seconds=10.0, losses=(2.0, 1.0), status="SUCCEEDED", **hyperparameters):
    return {
        "trial": number,
        "id": f"id{number}",
        "status": status,
        "accuracy": accuracy,
        "seconds": seconds,
        "losses": list(losses),
        "hyperparameters": {"lr": 0.01 * (number + 1)} | hyperparameters,
    }


def database(home, trials, experiment="abc123", start=1000):
    """Write trials as NNI 2.10.1 does, with its list of experiments; return the database's path."""
    folder = home / "nni-experiments" / experiment / "db"
    folder.mkdir(parents=True)
    listed = home / "nni-experiments" / ".experiment"
    known = json.loads(listed.read_text()) if listed.exists() else {}
    known[experiment] = {"startTime": start, "logDir": str(home / "nni-experiments")}
    listed.write_text(json.dumps(known))
    path = folder / "nni.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE TrialJobEvent (timestamp integer, trialJobId text, event text, data text,"
        " logPath text, sequenceId integer, message text);"
        "CREATE TABLE MetricData (timestamp integer, trialJobId text, parameterId text, type text,"
        " sequence integer, data text);"
        "CREATE TABLE ExperimentProfile (params text, id text, execDuration integer,"
        " startTime integer, endTime integer, logDir text, nextSequenceId integer,"
        " revision integer);"
    )
    profile = {"experimentName": "a search", "trialCommand": "python3 train.py"}
    for revision in (1, 2):
        row = (json.dumps(profile), experiment, 0, 0, None, "", 0, revision)
        connection.execute("INSERT INTO ExperimentProfile VALUES (?,?,?,?,?,?,?,?)", row)

    def event(timestamp, name, number, kind, data=None):
        row = (timestamp, name, kind, data, None, number, None)
        connection.execute("INSERT INTO TrialJobEvent VALUES (?,?,?,?,?,?,?)", row)

    def metric(name, number, kind, sequence, value):
        row = (0, name, str(number), kind, sequence, json.dumps(json.dumps(value)))
        connection.execute("INSERT INTO MetricData VALUES (?,?,?,?,?,?)", row)

    for entry in trials:
        name, number = entry["id"], entry["trial"]
        given = json.dumps({"parameter_id": number, "parameters": entry["hyperparameters"]})
        event(5, "", None, "ADD_CUSTOMIZED", "{}")
        event(1000, name, number, "WAITING", given)
        if entry["seconds"] is not None:
            event(2000, name, number, "RUNNING")
            if entry["status"] != "RUNNING":
                event(2000 + round(1000 * entry["seconds"]), name, number, entry["status"])
        for sequence, loss in reversed(list(enumerate(entry["losses"]))):
            metric(name, number, "PERIODICAL", sequence, loss)
        if entry["accuracy"] is not None:
            metric(name, number, "FINAL", 0, entry["accuracy"])
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def run(tmp_path):
    """Start `python choose.py ...` with a HOME of its own and in it."""

    def run(*args, **environment):
        return subprocess.run(
            [sys.executable, ROOT / "choose.py", *map(str, args)],
            env=os.environ | {"HOME": str(tmp_path)} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def refusal(result):
    """Return the one line with which choose.py ended."""
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("trials", "within", "expected"),
    [
        ([trial(0, 64.0), trial(1, 65.0), trial(2, 60.0, 1)], 0.5, 1),
        ([trial(0, 64.6, 9), trial(1, 65.0, 30), trial(2, 64.4, 1)], 0.5, 0),
        ([trial(0, 64.6, 9), trial(1, 65.0, 30), trial(2, 64.4, 1)], 0, 1),
        ([trial(0, 64.6, 9), trial(1, 65.0, 30), trial(2, 64.4, 1)], 1, 2),
        ([trial(0, 65, 9.2, [2, 1]), trial(1, 65, 8.9, [1.5, 1.4]), trial(2, 65, 30, [0])], 0.5, 1),
        ([trial(0, 65, 9.2, [2, 1]), trial(1, 65, 8.9, [2, 1.4])], 0.5, 0),
        ([trial(0, 65, 9, []), trial(1, 65, 9, [2])], 0.5, 1),
        ([trial(0, 65, None), trial(1, 65, 100)], 0.5, 1),
        ([trial(0, 64.9), trial(1, 65)], 0.5, 1),
        ([trial(0, 62.54, 1), trial(1, 63.04)], 0.5, 0),
        ([trial(0, 62.53, 1), trial(1, 63.04)], 0.5, 1),
    ],
)
def test_the_choice(trials, within, expected):
    for entry in trials:
        choose.measure(entry)
    assert choose.choose(trials, within)["trial"] == expected


MIXED = [
    trial(0, 60.0, 30.0, [2.0, 1.5, 1.25]),
    trial(1, None, 5.0, [2.3], "FAILED"),
    trial(2, 64.25, 90.0, [1.9, 1.1], optimizer="Adam"),
    trial(3, None, 9.0, [2.2], "USER_CANCELED"),
    trial(4, 64.0, 40.0, [1.9, 1.2]),
    trial(5, 70.0, 9.0, [1.0], "EARLY_STOPPED"),
    trial(6, None, 12.0, [1.8], "RUNNING"),
    trial(7, None, None, [], "WAITING"),
    trial(8, None, 12.0, [1.8]),
    trial(9, float("nan"), 12.0, [float("nan")]),
]


def test_the_table_ranks_what_has_a_result_and_names_the_rest(run, tmp_path):
    database(tmp_path, MIXED)
    result = run()
    assert result.returncode == 0, result.stderr
    title, head, *rows, counts, rule, hyperparameters = result.stdout.splitlines()
    assert title == "abc123: a search"
    assert " ".join(head.split()) == "trial accuracy seconds final loss area lr optimizer"
    assert [row.split() for row in rows] == [
        ["2", "64.25", "90", "1.100", "1.500", "0.03", "Adam"],
        ["*", "4", "64.00", "40", "1.200", "1.550", "0.05", "-"],
        ["0", "60.00", "30", "1.250", "1.583", "0.01", "-"],
    ]
    assert counts == (
        "3 of 10 trials have a result; left out: 1 FAILED, 1 USER_CANCELED, 1 EARLY_STOPPED,"
        " 1 RUNNING, 1 WAITING, 2 without a result"
    )
    assert rule.startswith("* the choice, trial 4 (id4): within 0.5 points of the best accuracy")
    assert json.loads(hyperparameters) == {"lr": 0.05}


def test_the_latest_experiment_is_the_default(run, tmp_path):
    database(tmp_path, [trial(0, 60.0)], "older", start=1)
    database(tmp_path, [trial(0, 61.0)], "latest", start=3)
    database(tmp_path, [trial(0, 62.0)], "old", start=2)
    assert run().stdout.startswith("latest: ")
    assert run("old").stdout.startswith("old: ")


def test_top_shortens_the_table_only(run, tmp_path):
    database(tmp_path, MIXED)
    result = run("--top", 1)
    assert len(result.stdout.splitlines()) == 6
    assert "trial 4 (id4)" in result.stdout
    assert len(json.loads(run("--top", 1, "--json").stdout)["trials"]) == len(MIXED)


def test_json_is_read_again(run, tmp_path):
    database(tmp_path, MIXED)
    printed = run("--json").stdout
    assert json.loads(printed)["choice"] == "id4"
    (tmp_path / "results.json").write_text(printed)
    assert run("--file", "results.json").stdout == run().stdout
    assert run("--file", "results.json", "--json").stdout == printed


def test_csv_has_a_column_for_each_hyperparameter(run, tmp_path):
    database(tmp_path, MIXED)
    rows = list(csv.DictReader(io.StringIO(run("--csv").stdout)))
    assert [row["trial"] for row in rows] == ["2", "4", "0"]
    assert rows[0] == {
        "trial": "2",
        "id": "id2",
        "accuracy": "64.25",
        "seconds": "90.0",
        "final_loss": "1.1",
        "area": "1.5",
        "lr": "0.03",
        "optimizer": "Adam",
    }


def test_out_is_what_train_py_takes(run, tmp_path):
    database(tmp_path, MIXED)
    assert run("--out", "best.json").returncode == 0
    kept = json.loads((tmp_path / "best.json").read_text())
    assert kept == {
        "experiment": "abc123",
        "trial": 4,
        "id": "id4",
        "accuracy": 64.0,
        "hyperparameters": {"lr": 0.05},
    }
    assert train.parse_args(["--params", str(tmp_path / "best.json")]).lr == 0.05


def test_the_plot_is_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    database(tmp_path, MIXED)
    result = run("--plot", "search.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("*.tmp")) == []


def test_without_matplotlib_only_the_plot_is_refused(run, tmp_path):
    database(tmp_path, MIXED)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    line = refusal(run("--plot", "search.png", PYTHONPATH=str(tmp_path)))
    assert "--plot needs matplotlib (pip install matplotlib)" in line
    assert not (tmp_path / "search.png").exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["nobody"], ["EXPERIMENT_ID is 'nobody'", "allowed: abc123"]),
        (["--within", "-1"], ["--within is -1.0", ">= 0"]),
        (["--within", "nan"], ["--within is nan", ">= 0"]),
        (["--top", "0"], ["--top is 0", ">= 1"]),
        (["--json", "--csv"], ["--csv", "not allowed with", "--json"]),
        (["--out", "no/such/best.json"], ["cannot write no/such/best.json"]),
        (["--file", "missing.json"], ["missing.json", "No such file"]),
        (["--file", "text.json"], ["text.json is not JSON"]),
        (["--file", "other.json"], ["other.json holds no results", "KeyError: 'experiment'"]),
        (["--file", "list.json"], ["list.json holds no results"]),
        (["abc123", "--file", "list.json"], ["EXPERIMENT_ID is 'abc123'", "--file"]),
    ],
)
def test_refusals(run, tmp_path, args, parts):
    database(tmp_path, MIXED)
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "list.json").write_text("[1, 2]")
    line = refusal(run(*args))
    assert all(part in line for part in parts), line


def test_an_experiment_without_a_result(run, tmp_path):
    database(tmp_path, [trial(0, None, 5.0, [], "RUNNING")])
    assert "a search: none of 1 trials has a result" in refusal(run())
    database(tmp_path, [], "empty", start=5000)
    assert "a search: none of 0 trials has a result" in refusal(run())


def test_a_machine_without_experiments(run, tmp_path):
    assert f"no experiment: {tmp_path}/nni-experiments/.experiment lists none" in refusal(run())


def test_a_database_that_is_missing_or_damaged(run, tmp_path):
    path = database(tmp_path, MIXED)
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    assert f"cannot read {path}" in refusal(run())
    path.unlink()
    assert f"cannot read {path}: unable to open" in refusal(run())
    assert not path.exists()


def test_a_database_in_use_is_read_and_one_that_stays_locked_is_not(run, tmp_path):
    path = database(tmp_path, MIXED)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")  # a writer, who lets others read
        assert run().returncode == 0
        connection.execute("ROLLBACK")
        connection.execute("BEGIN EXCLUSIVE")
        assert f"cannot read {path}: database is locked" in refusal(run())
    finally:
        connection.close()


def test_the_exported_searches_in_docs_are_read(run):
    searches = ROOT / "docs" / "searches"
    printed = {}
    for name in ("cpu", "default", "early_stop", "validate", "wide"):
        result = run("--file", searches / f"{name}.json")
        assert result.returncode == 0, result.stderr
        assert "* the choice" in result.stdout
        printed[name] = result.stdout
    best = json.loads((searches / "wide_choice.json").read_text())
    assert best["id"] in printed["wide"]
    args = train.parse_args(["--params", str(searches / "wide_choice.json")])
    assert args.epochs == best["hyperparameters"]["epochs"]
