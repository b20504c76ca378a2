"""progress.py: the lines and the bar of a running search, and its end."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT
from experiment import MANAGER, UNCHECKED, free_port, processes_at
from nni.experiment import rest
from nnis_files import database, trial

from nnisearch.shared import results
from nnisearch.watch import life, progress

# A light trial: it runs the Python code that its tuner has chosen.
TRIAL = """
import functools, itertools, os, signal, sys, time
import other_project
tell = functools.partial(other_project.report, "FINAL")
number = itertools.count()
report = lambda value: other_project.report("PERIODICAL", value, next(number))
exec(other_project.GIVEN["parameters"]["do"])
"""
NNIS_OWN = "import nni, numpy; nni.get_next_parameter(); nni.report_final_result"
DYING = """
import os, signal
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.assessor import Assessor

class Dying(GridSearchTuner):
    def __init__(self, when):
        super().__init__()
        self.when, self.asked = when, 0

    def generate_parameters(self, *args, **others):
        self.asked += 1
        if self.when == "asked" and self.asked > 1:
            raise ZeroDivisionError("no more ideas")
        return super().generate_parameters(*args, **others)

    def receive_trial_result(self, *args, **others):
        if self.when == "told":
            raise KeyError("what is that?")
        if self.when == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

class Judge(Assessor):
    def assess_trial(self, *args):
        raise ValueError("no idea")
"""


@pytest.fixture
def start_search(home, start_search):
    """Start a search whose trials run these pieces of Python in turn, and what shows it."""
    (home / "trial.py").write_text(TRIAL)
    (home / "dying.py").write_text(DYING)

    def start_pieces(*pieces, before=(), **changes):
        config = {
            "experimentName": "in turn",
            "searchSpace": {"do": {"_type": "choice", "_value": list(pieces)}},
            "trialCommand": f"{sys.executable} trial.py",
            "trialCodeDirectory": str(home),
            "trialConcurrency": 1,
            "maxTrialNumber": len(pieces),
            "tuner": {"name": "GridSearch"},
            "trainingService": {"platform": "local"},
        }
        how = {"config": config | changes, "how": UNCHECKED, "before": before}
        return start_search("-p", free_port(), **how)

    return start_pieces


@pytest.fixture
def run_search(run_search):
    """Start as above and wait; return what was printed, and the lines of its trials in lines."""

    def run_pieces(*pieces, **how):
        search = run_search(*pieces, **how)
        lines = re.findall(r"^trial (\d+) \(\w+\)(?:: | )(.*)", search.stdout, re.MULTILINE)
        search.lines = [f"{number}: {text}" for number, text in lines]
        return search

    return run_pieces


def nnictl(home, *args):
    command = [Path(sys.executable).parent / "nnictl", *map(str, args)]
    return subprocess.run(
        command, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True, check=True
    ).stdout


def read_until(process, part):
    """Return the line of a search's output that holds a part."""
    for line in process.stdout:
        if part in line:
            return line
    raise AssertionError(f"no {part!r}: {process.stderr.read()}")


# What trials report, and how they end


def test_each_trial_without_a_result_is_explained(run_search):
    pieces = [
        "tell(0.5)",
        "tell({'default': 0.25, 'other': 'x'})",
        f"{NNIS_OWN}(numpy.float32(0.125))",
        f"{NNIS_OWN}({{'default': numpy.array(0.75)}})",
        "tell('\\x1b[31mhigh')",
        "tell(None)",
        "tell(10 ** 400)",
        "tell(float('nan'))",
        "tell([1, 2])",
        "tell({'loss': 1})",
        "pass",
    ]
    search = run_search(*pieces, trialConcurrency=3, experimentName=None)
    assert search.returncode == 0, search.stderr
    while_it_ran, table = search.stdout.split("4 of 11 trials have a result; left out: ")
    # Each trial has one line, which ends with the best so far.
    lines = re.findall(r"^trial \d+ \(\w+\):? (.*); (?:best|no res)", while_it_ran, re.MULTILINE)
    assert sorted(lines) == sorted(
        [
            "0.5",
            "0.25",
            "0.125",
            "0.75",
            f'reported "\\u001b[31mhigh", {results.NO_RESULT}',
            f"reported null, {results.NO_RESULT}",
            f"reported 1{'0' * 19}...{'0' * 37}, {results.NO_RESULT}",
            f"reported NaN, {results.NO_RESULT}",
            f"reported [1, 2], {results.NO_RESULT}",
            f'reported {{"loss": 1}}, {results.NO_RESULT}',
            "has ended without reporting a result",
        ]
    )
    assert table.startswith("7 without a result\n")
    assert table.count(results.NO_RESULT) == 5
    assert "\x1b" not in search.stdout
    assert "Traceback" not in search.stderr


def test_a_repeated_failure_is_explained_once_and_counted(run_search):
    again = "raise ValueError('no luck')"
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    search = run_search(f"{again} # 1", f"{again} # 2", "sys.exit(3)", kill)
    assert search.returncode == 1
    assert search.stdout.count("has FAILED: ValueError: no luck (exit status 1)") == 1
    assert search.stdout.count("FAILED with exit status 1; no result yet") == 1
    assert len(re.findall(r"has FAILED: .* \(exit status 3\); no result", search.stdout)) == 1
    assert len(re.findall(r"has FAILED: .* \(exit status 137\); no result", search.stdout)) == 1
    assert len(search.lines) == 4
    assert search.lines[-1].endswith("; no result")
    assert "None of 4 trials has a result: 2 FAILED with exit status 1, " in search.stdout


def test_early_stopped_trials_name_the_duration_or_the_assessor(run_search):
    search = run_search("report(1.0); time.sleep(60)", maxTrialDuration=2)
    assert search.returncode == 1
    assert search.lines[-1] == "0: was ended by maxTrialDuration (2); no result"
    assert "None of 1 trials has a result: 1 ended by maxTrialDuration (2)" in search.stdout
    bad = "[(report(0.0), time.sleep(0.5)) for _ in range(100)]"
    good = "[report(1.0) for _ in range(4)]; tell(1.0); time.sleep(2)"
    turns = [*[f"{good} # {number}" for number in range(3)], bad]
    search = run_search(
        *turns,
        maxTrialDuration="60s",
        assessor={"name": "Medianstop", "classArgs": {"start_step": 1}},
        searchSpace={"combine_params": {"_type": "choice", "_value": [{"do": x} for x in turns]}},
        tuner={"name": "Batch"},  # which gives them in this order
    )
    assert search.returncode == 0, search.stderr
    assert search.lines[-1] == "3: was ended by the assessor; best 1"


def test_the_best_result_is_the_least_if_the_tuner_minimizes(run_search, home):
    pieces = [f"tell({number})" for number in (4, 1, 3, 2)]
    search = run_search(*pieces, tuner={"name": "TPE", "classArgs": {"seed": 1}})
    assert search.returncode == 0, search.stderr
    told = [line.split(": ")[1].split("; best ") for line in search.lines]
    values = [float(value) for value, _ in told]
    assert [float(best) for _, best in told] == [min(values[: n + 1]) for n in range(4)]
    printed = subprocess.run(
        [sys.executable, "-m", "nnisearch.after.choose", "--json"],
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    ).stdout
    found = json.loads(printed)
    assert found["direction"] == "minimize"
    (chosen,) = (t for t in found["trials"] if t["id"] == found["choice"])
    assert chosen["result"] == min(values)


def test_a_grid_smaller_than_max_trial_number_ends_the_search(run_search):
    search = run_search("tell(1)", "tell(2)", "tell(3)", maxTrialNumber=50, trialConcurrency=2)
    assert search.returncode == 0, search.stderr
    assert len(search.lines) == 3
    assert "The tuner has no more after 3 trials; maxTrialNumber is 50" in search.stdout


def test_the_first_result_counts_unless_the_trial_fails(run_search):
    tuner = {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}  # NNI's dies of the second
    twice, fails = "tell(1); tell(2); time.sleep(2)", "tell(3); sys.exit(2)"
    search = run_search(f"{twice} # 1", f"{twice} # 2", tuner=tuner)
    assert search.returncode == 0, search.stderr
    assert [line.split(": ")[1] for line in search.lines] == ["1; best 1"] * 2
    search = run_search(fails)
    assert search.returncode == 1
    assert "(exit status 2); so its result, 3, does not count; no result" in search.lines[0]


def test_a_closed_output_ends_the_command(run_search):
    pipe = ["bash", "-c", 'set -o pipefail; "$@" | head -3', "-"]  # up to the Web UI's address
    search = run_search("tell(1)", "tell(2)", before=pipe)
    assert search.returncode == 128 + signal.SIGPIPE
    assert search.stdout.count("\n") == 3
    assert search.stderr == ""


# Other ends of a search


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("asked", "the tuner has died: ZeroDivisionError: no more ideas"),
        ("told", "the tuner has died: KeyError: 'what is that?'"),
        ("killed", "the tuner has died"),
    ],
)
def test_a_dead_tuner_is_noticed_and_its_error_shown(run_search, when, words):
    tuner = {"className": "dying.Dying", "codeDirectory": ".", "classArgs": {"when": when}}
    search = run_search("tell(1)", "tell(2)", "tell(3)", tuner=tuner)
    assert search.returncode == 1
    (line,) = search.stderr.splitlines()[-1:]
    assert words in line
    id = re.search(r"^Search (\w+)", search.stdout, re.MULTILINE)[1]
    what = "fix that and continue" if when != "killed" else "to continue"
    assert f"; {what}: " in line
    assert f"python search.py --resume {id}" in line
    if when == "asked":  # after a first result
        assert line.endswith(f"; results so far: python choose.py {id}")


def test_a_dead_assessor_is_not_called_the_tuner(run_search):
    judge = {"className": "dying.Judge", "codeDirectory": "."}
    search = run_search("report(1.0); time.sleep(60)", assessor=judge)
    died = "the assessor has died: ValueError: no idea; fix that and continue: "
    assert died in search.stderr


def test_a_killed_manager_is_not_called_stopped(start_search, home):
    with start_search("time.sleep(60)") as process:
        read_until(process, "Web UI")
        time.sleep(1)
        for manager in processes_at(home, MANAGER):
            manager.kill()
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    died = "NNI's manager has died: no error message; was it killed?"
    assert f"{died}; to continue: python search.py" in stderr


def test_a_stopped_search_is_called_stopped(start_search, home):
    with start_search("time.sleep(60)") as process:
        id = read_until(process, "Web UI").split()[-1]
        nnictl(home, "stop", id)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.endswith(
        f"search {id} has been stopped; to continue: python search.py --resume {id}\n"
    )


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watched search with a database of our own; this process stands in for the manager."""
    monkeypatch.setenv("HOME", str(tmp_path))
    database(tmp_path, [trial(0, 60.0), trial(1, None, None, [], "WAITING")])
    known = tmp_path / "nni-experiments" / ".experiment"
    entry = {"pid": os.getpid(), "prefixUrl": "my/prefix", "status": "RUNNING"}
    known.write_text(json.dumps({"abc123": json.loads(known.read_text())["abc123"] | entry}))
    monkeypatch.setattr(life.Life, "find_manager", lambda _: psutil.Process())
    folder = tmp_path / "nni-experiments" / "abc123"
    commands = ("nnisearch --resume abc123", "nnichoose abc123")
    return progress.Search("abc123", 1, folder, *commands)


def test_a_slow_manager_is_asked_again(watched, monkeypatch, capsys):
    def silent(*_, **__):
        raise ConnectionError("Read timed out.")

    monkeypatch.setattr(rest, "get", silent)
    assert watched.ask() == (None, [])
    assert capsys.readouterr().out == ""
    watched.heard -= 25
    assert watched.ask() == watched.ask() == (None, [])
    assert re.fullmatch(
        r"search abc123 has not answered for 2\d s; still waiting: Read timed out\.\n",
        capsys.readouterr().out,
    )
    monkeypatch.setattr(life, "lives", lambda process: False)
    for answers in (
        silent,
        lambda *_, **__: {"status": "DONE"},
    ):  # the latter: who has its port now
        monkeypatch.setattr(rest, "get", answers)
        with pytest.raises(RuntimeError, match="NNI's manager has died: "):
            watched.ask()


def test_after_its_files_are_removed_a_search_ends_with_the_managers_error(watched, monkeypatch):
    said = {"status": "ERROR", "errors": ["SQLITE_READONLY"]}
    monkeypatch.setattr(rest, "get", lambda *_, **__: said)
    watched.trials.path.unlink()
    with pytest.raises(RuntimeError, match=r"sqlite has been removed; .* SQLITE_READONLY; to end"):
        watched.ask()


def test_a_queued_trial_is_waited_for_if_the_tuner_has_no_more(watched, monkeypatch):
    answers = {"/experiment": {"nextSequenceId": 3}, "/check-status": {"status": "RUNNING"}}
    asked = []

    def get(port, what, prefix):
        asked.append((port, what, prefix))
        return answers[what]

    monkeypatch.setattr(rest, "get", get)
    watched.ask()
    assert asked == [(1, "/check-status", "my/prefix")]
    no_more = {"status": "TUNER_NO_MORE_TRIAL"}
    watched.changed -= 100
    assert not watched.is_done(no_more)
    watched.trials.known["id1"].status = "SUCCEEDED"
    assert not watched.is_done(no_more)  # the third trial has a number, and has not started
    answers["/experiment"]["nextSequenceId"] = 2
    assert watched.is_done(no_more)
    assert watched.shortfall(no_more) == ""
    answers["/experiment"]["params"] = {"maxTrialNumber": 9, "maxExperimentDuration": "1h"}
    assert watched.shortfall(no_more) == "The tuner has no more after 2 trials; maxTrialNumber is 9"
    assert "maxExperimentDuration is 1h, and has pass" in watched.shortfall({"status": "DONE"})
    assert watched.shortfall({"status": "VIEWED"}) == ""
    watched.changed = time.monotonic()
    assert not watched.is_done(no_more)  # NNI may be about to start one


def test_an_idle_search_is_reported_once(watched, capsys):
    watched.trials.update()
    watched.life.tuner_is_dead = lambda: False
    watched.changed -= 100
    watched.check({"status": "RUNNING"})
    assert capsys.readouterr().out == ""  # a trial waits
    watched.trials.known["id1"].status = "SUCCEEDED"
    for _ in range(2):
        watched.check({"status": "RUNNING"})
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(r"no trial runs or waits, and the tuner has proposed none for 1\d\d s", line)
    assert line.endswith("abc123/log/dispatcher.log")


def test_only_a_trial_without_a_runner_notes_its_exit_status(watched, tmp_path):
    watched.trials.update()
    ended = watched.trials.known["id1"]
    ended.status = "FAILED"
    for reuse_mode in (False, True):
        service = SimpleNamespace(platform="local", reuse_mode=reuse_mode)
        news = progress.Endings(SimpleNamespace(training_service=service), tmp_path).news(ended)
        assert ("was it killed?" in news) != reuse_mode


def test_a_viewed_search_is_reported_as_not_running(watched):
    with pytest.raises(RuntimeError, match=r"shown by nnictl view.*: nnictl stop abc123; nnis"):
        watched.check({"status": "VIEWED"})


def test_a_pass_reads_only_what_is_new(tmp_path):
    path = database(tmp_path, [trial(0, 60.0), trial(1, None, 3.0, [2.0], "RUNNING")])
    trials = results.Trials(path)
    assert [t.id for t in trials.update()] == ["id0", "id1"]
    assert trials.update() == []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for kind, sequence, value in (("PERIODICAL", 1, 1.5), ("FINAL", 0, 61.0)):
            row = (9_000, "id1", "1", kind, sequence, json.dumps(json.dumps(value)))
            connection.execute("INSERT INTO MetricData VALUES (?,?,?,?,?,?)", row)
        row = (9_500, "id1", "SUCCEEDED", None, None, 1, None)
        connection.execute("INSERT INTO TrialJobEvent VALUES (?,?,?,?,?,?,?)", row)
        connection.commit()
    (changed,) = trials.update()
    assert (changed.status, changed.result) == ("SUCCEEDED", 61.0)
    assert changed.intermediate == [2.0, 1.5]
    assert changed.seconds == 7.5
    with contextlib.closing(sqlite3.connect(path)) as connection:  # as machines.js runs it again
        connection.execute("DELETE FROM MetricData WHERE trialJobId = 'id1' AND type <> 'FINAL'")
        row = (9_600, "id1", "WAITING", None, None, 1, None)
        connection.execute("INSERT INTO TrialJobEvent VALUES (?,?,?,?,?,?,?)", row)
        row = (9_700, "id1", "1", "PERIODICAL", 0, json.dumps("4.0"))
        connection.execute("INSERT INTO MetricData VALUES (?,?,?,?,?,?)", row)
        connection.commit()
    changed = {trial.id: trial for trial in trials.update()}
    assert (changed["id1"].status, changed["id1"].intermediate) == ("WAITING", [4.0])
    assert changed["id0"].result == 60.0


def test_nni_can_write_while_a_search_is_read_and_ctrl_z_waits_for_a_query(tmp_path, monkeypatch):
    path = database(tmp_path, [trial(0, 60.0, None, [1.0] * 2500)])
    blocked, connect = [], sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, *args):
            blocked.append(signal.SIGTSTP in signal.pthread_sigmask(signal.SIG_BLOCK, []))
            return super().execute(*args)

    monkeypatch.setattr(
        results.sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Connection)
    )
    trials = results.Trials(path)
    with contextlib.closing(connect(path, timeout=0, isolation_level=None)) as nni:
        nni.execute("PRAGMA synchronous = OFF")
        note_metric, written = trials.note_metric, []

        def write_and_note(*metric):
            row = (9_000, "new", "1", "PERIODICAL", 0, json.dumps("1.5"))
            written.append(nni.execute("INSERT INTO MetricData VALUES (?,?,?,?,?,?)", row))
            return note_metric(*metric)

        monkeypatch.setattr(trials, "note_metric", write_and_note)
        (found,) = trials.update()
    assert len(found.intermediate) == 2500 < len(written)
    assert all(blocked)
    assert len(blocked) == 1 + 2 + 4  # a thousand rows at a time
    assert signal.SIGTSTP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
