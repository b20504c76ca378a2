"""progress.py: the lines and the bar of a running search, and its end."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, read_until, to_its_end
from experiment import MANAGER, UNCHECKED, free_port, processes_at
from nni.experiment import rest
from nnis_files import EVENT, METRIC, database, trial
from waiting import wait_for

from nnisearch.results import database as databases
from nnisearch.results import trials as results
from nnisearch.shared import processes
from nnisearch.watch import liveness, progress

TRIAL = ROOT / "tests" / "support" / "scripted_trial.py"


@pytest.fixture
def start_pieces(home, start_search):
    """Start a search whose trials run these pieces of Python, and what shows it."""

    def start_pieces(*pieces, before=(), **changes):
        config = {
            "experimentName": "in turn",
            "searchSpace": {"do": {"_type": "choice", "_value": list(pieces)}},
            "trialCommand": f"{sys.executable} {TRIAL}",
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
def run_pieces(start_pieces):
    """Start as above and wait; return what was printed, and the lines of its trials in lines."""

    def run_pieces(*pieces, **how):
        search = to_its_end(start_pieces)(*pieces, **how)
        lines = re.findall(r"^trial (\d+) \(\w+\)(?:: | )(.*)", search.stdout, re.MULTILINE)
        search.lines = [f"{number}: {text}" for number, text in lines]
        return search

    return run_pieces


# What trials report, and how they end


def test_each_trial_is_told_in_one_line_with_the_least_result_so_far(run_pieces):
    nnis_own = "import nni, numpy; nni.get_next_parameter(); nni.report_final_result"
    told_results = {  # {piece: (line, result)}
        "tell(0.5)": ("0.5", 0.5),
        "tell({'default': 0.25, 'other': 'x'})": ("0.25", 0.25),
        f"{nnis_own}(numpy.float32(0.125))": ("0.125", 0.125),
        "tell({'default': {'__ndarray__': 0.75, 'dtype': 'float64', 'shape': []}})": ("0.75", 0.75),
        "tell(1); tell(2)": ("1", 1),
        "[report(1.0) for _ in range(50)]; tell(4); Path('good').touch()": ("4", 4),
        "wait_for('good'); [(report(0.0), time.sleep(0.5)) for _ in range(50)]": (
            "was ended by the assessor",
            None,
        ),
        "pass": ("has ended without reporting a result", None),
    }
    no_results = {
        "tell('\\x1b[31mhigh')": '"\\u001b[31mhigh"',
        "tell(None)": "null",
        "tell(10 ** 400)": f"1{'0' * 19}...{'0' * 37}",
        "tell(float('nan'))": "NaN",
        "tell([1, 2])": "[1, 2]",
        "tell({'loss': 1})": '{"loss": 1}',
    }
    for piece, text in no_results.items():
        told_results[piece] = f"reported {text}, {results.NO_RESULT}", None
    search = run_pieces(
        *told_results,
        tuner={"name": "TPE"},
        assessor={"name": "Medianstop", "classArgs": {"start_step": 1}},
        trialConcurrency=3,
        maxTrialNumber=50,
        maxTrialDuration="100s",
        experimentName=None,
    )
    assert search.returncode == 0, search.stderr
    direction = "The least result counts as the best; for the greatest: classArgs: {optimize_mode: "
    assert direction in search.stdout
    while_it_ran, table = search.stdout.split("6 of 14 trials have a result; left out: ")
    assert "The tuner has no more after 14 trials; maxTrialNumber is 50" in while_it_ran
    line = r"^trial \d+ \(\w+\):? (.*); (?:best (.*)|no result yet)$"
    told = re.findall(line, while_it_ran, re.MULTILINE)
    by_line = dict(told_results.values())
    assert sorted(text for text, _ in told) == sorted(by_line)
    so_far = []
    for text, best in told:
        so_far += [] if by_line[text] is None else [by_line[text]]
        assert best == (f"{min(so_far):g}" if so_far else "")
    stopped = "1 EARLY_STOPPED (by maxTrialDuration or an assessor)"
    assert sorted(table.splitlines()[0].split(", ")) == [stopped, "7 without a result"]
    assert table.count(results.NO_RESULT) == 5
    assert "\x1b" not in search.stdout
    assert "Traceback" not in search.stderr
    assert re.search(r" trial +result .*\n[ *]+\d+ +0\.125 ", while_it_ran)  # the best trial


def test_each_failure_is_explained_once_and_counted(run_pieces):
    again = "raise ValueError('no luck')"
    late = "report(1.0); time.sleep(60)"
    fails = "tell(3); raise SystemExit(2)"
    pieces = [f"{again} # 1", f"{again} # 2", "raise SystemExit(3)", "be_killed()", fails]
    search = run_pieces(*pieces, late, maxTrialDuration=8, trialConcurrency=3)
    assert search.returncode == 1
    assert search.stdout.count("has FAILED: ValueError: no luck (exit status 1)") == 1
    assert search.stdout.count("FAILED with exit status 1; no result yet") == 1
    assert len(re.findall(r"has FAILED: .* \(exit status 3\); no result", search.stdout)) == 1
    assert len(re.findall(r"has FAILED: .* \(exit status 137\); no result", search.stdout)) == 1
    assert "(exit status 2); so its result, 3, does not count; no result" in search.stdout
    assert len(search.lines) == 6
    assert search.lines[-1] == "5: was ended by maxTrialDuration (8); no result"
    assert "None of 6 trials has a result: 2 FAILED with exit status 1, " in search.stdout
    assert ", 1 ended by maxTrialDuration (8)" in search.stdout


# Other ends of a search


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "end"),
    [
        ("tuner", "Mortal", {"is_killed": False}, ": KeyError: 'what is that?'; fix that and"),
        ("tuner", "Mortal", {"is_killed": True}, "; to"),
        ("assessor", "Patient", {"patience": 1}, ": ValueError: no idea; fix that and"),
    ],
)
def test_the_death_of_tuner_or_assessor_is_noticed_and_its_error_shown(
    start_pieces, home, kind, name, arguments, end
):
    own = {"className": f"own.{name}", "codeDirectory": str(TRIAL.parent), "classArgs": arguments}
    piece = "wait_for('start'); report('no idea'); tell(1)"
    with start_pieces(piece, "tell(2)", **{kind: own}) as process:
        id = read_until(process, "Web UI").split()[-1]
        read_until(process, "counts as the best")  # from now on the manager's errors are read
        (home / "start").touch()
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    line = stderr.splitlines()[-1]
    died = f"the {kind} has died.*{re.escape(end)} continue: .*python search.py --resume {id}"
    assert re.search(died, line), line
    if arguments == {"is_killed": False}:  # after a first result
        assert line.endswith(f"; results so far: python choose.py {id}")


def test_what_ends_only_the_command_and_how_a_stopped_search_is_told(
    start_pieces, start_search, home
):
    pipe = ["bash", "-c", 'set -o pipefail; "$@" | head -3', "-"]  # up to the Web UI's address
    with start_pieces("tell(1)", "time.sleep(60)", before=pipe) as process:
        stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGPIPE
    assert stdout.count("\n") == 3
    assert stderr == ""
    id = stdout.split()[-1]
    with start_search("--resume", id) as process:
        read_until(process, "trial 0")
        process.terminate()
        read_until(
            process, f"The search continues. To watch it again: python search.py --resume {id}"
        )
        assert process.wait(60) == 128 + signal.SIGTERM
    with start_search("--resume", id) as process:
        read_until(process, "trial 0")
        for manager in processes_at(home, MANAGER):
            manager.terminate()  # as nnictl stop does
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    next_steps = f"python search.py --resume {id}; results so far: python choose.py {id}"
    assert stderr.endswith(f"search {id} has been stopped; to continue: {next_steps}\n")


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watched search with a database of our own; this process stands in for the manager."""
    monkeypatch.setenv("HOME", str(tmp_path))
    database(tmp_path, [trial(0, 60.0), trial(1, None, None, [], "WAITING")])
    listed = tmp_path / "nni-experiments" / ".experiment"
    listed.write_text(listed.read_text().replace("STOPPED", "RUNNING"))
    monkeypatch.setattr(liveness, "manager_of", lambda _: psutil.Process())
    folder = tmp_path / "nni-experiments" / "abc123"
    commands = ("nnisearch --resume abc123", "nnichoose abc123")
    return progress.Watched("abc123", 1, folder, *commands)


@pytest.fixture
def answer(monkeypatch):
    """Let NNI's manager answer {path: answer}, or raise an exception."""

    def answer(answers):
        def get(port, path, **_):
            if isinstance(answers, Exception):
                raise answers
            return answers[path]

        monkeypatch.setattr(rest, "get", get)

    return answer


RUNNING = {"status": "RUNNING"}


def test_a_slow_manager_is_asked_again_and_a_dead_one_is_not_called_stopped(
    watched, answer, monkeypatch, capsys
):
    answer(ConnectionError("Read timed out."))
    assert watched.ask() == (None, [])
    assert capsys.readouterr().out == ""
    watched.heard -= 25
    assert watched.ask() == watched.ask() == (None, [])
    assert re.fullmatch(
        r"search abc123 has not answered for 2\d s; still waiting: Read timed out\.\n",
        capsys.readouterr().out,
    )
    monkeypatch.setattr(liveness, "lives", lambda process: None)  # it cannot be seen
    assert watched.ask() == (None, [])
    monkeypatch.setattr(liveness, "lives", lambda process: False)
    died = "NNI's manager has died: no error message; was it killed?"
    results_so_far = "results so far: nnichoose abc123"  # which no pass has read before
    end = f"search abc123: {died}; to continue: nnisearch --resume abc123; {results_so_far}"
    for answers in (ConnectionError(), {"/check-status": {"status": "DONE"}}):  # who has its port
        answer(answers)
        with pytest.raises(RuntimeError, match=f"^{re.escape(end)}$"):
            watched.ask()


def test_a_queued_trial_is_waited_for_if_the_tuner_has_no_more(watched, answer):
    answers = {"/experiment": {"nextSequenceId": 3}, "/check-status": RUNNING}
    answer(answers)
    watched.ask()
    no_more = {"status": "TUNER_NO_MORE_TRIAL"}
    watched.changed -= 100
    assert not watched.is_done(no_more)
    watched.trials.by_id["id1"].status = "SUCCEEDED"
    assert not watched.is_done(no_more)  # the third trial has a number, and has not started
    answers["/experiment"]["nextSequenceId"] = 2
    assert watched.is_done(no_more)
    assert watched.shortfall(no_more) == ""
    answers["/experiment"]["params"] = {"maxTrialNumber": 9, "maxExperimentDuration": "1h"}
    assert watched.shortfall(no_more) == "The tuner has no more after 2 trials; maxTrialNumber is 9"
    assert "maxExperimentDuration is 1h, and has pass" in watched.shortfall({"status": "DONE"})
    watched.changed = time.monotonic()
    assert not watched.is_done(no_more)  # NNI may be about to start one


def test_the_bar_follows_a_changed_number_of_trials(watched, answer):
    display = SimpleNamespace(bar=SimpleNamespace(total=2), late={}, show=lambda *_: None)
    watched.check = lambda _: None
    params = {"maxTrialNumber": 9}
    answer({"/experiment": {"params": params}, "/check-status": RUNNING})
    assert not progress.show_once(watched, display)
    assert display.bar.total == 9


def test_an_idle_search_is_reported_once(watched, capsys):
    watched.trials.update()
    watched.liveness.tuner_is_dead = lambda: False
    watched.changed -= 100
    watched.check(RUNNING)
    assert capsys.readouterr().out == ""  # a trial waits
    watched.trials.by_id["id1"].status = "SUCCEEDED"
    for _ in range(2):
        watched.check(RUNNING)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(r"no trial runs or waits, and the tuner has proposed none for 1\d\d s", line)
    assert line.endswith("abc123/log/dispatcher.log")


@pytest.fixture
def start_child():
    """Start a child of this process, which is killed at the end."""
    children = []

    def start_child(*command, **variables):
        children.append(subprocess.Popen(command, env=os.environ | variables))
        return children[-1]

    yield start_child
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.parametrize("error", [psutil.AccessDenied(), PermissionError(), FileNotFoundError()])
def test_a_zombie_or_a_closed_process_never_makes_a_search_dead(
    watched, start_child, monkeypatch, error
):
    folder = watched.trials.path.parents[1]
    closed, zombie = start_child("sleep", "600"), start_child("true")
    tuner = start_child("sleep", "600", NNI_LOG_DIRECTORY=f"{folder}/log")
    trial = start_child("sleep", "600", NNI_EXP_ID="abc123")
    wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    closed_pids = {closed.pid, tuner.pid}

    for method in ("cmdline", "environ", "ppid", "status", "uids"):
        read = getattr(psutil.Process, method)

        def read_open(process, method=method, read=read):
            # As with /proc mounted with hidepid=1; a parent can be read without that.
            if process.pid in closed_pids and (method != "ppid" or process.pid == closed.pid):
                raise error
            is_tuner = method == "cmdline" and process.pid == tuner.pid
            return ["python3", "--exp_params"] if is_tuner else read(process)

        monkeypatch.setattr(psutil.Process, method, read_open)
    assert not any(watched.liveness.tuner_is_dead() for _ in range(9))  # the tuner is closed
    closed_pids.remove(tuner.pid)
    assert not any(watched.liveness.tuner_is_dead() for _ in range(9))
    assert watched.liveness.tuner.pid == tuner.pid
    assert processes.lives(psutil.Process(closed.pid)) is None
    assert "abc123" not in processes.managers()
    family = processes.processes_of("abc123", folder)
    assert {process.pid for process in family} == {tuner.pid, trial.pid}
    processes.stop(zombie.pid, folder)
    assert tuner.wait(60) == trial.wait(60) == -signal.SIGTERM
    assert watched.liveness.tuner_is_dead()
    assert closed.poll() is None


def test_a_pass_reads_only_what_is_new(tmp_path):
    path = database(tmp_path, [trial(0, 60.0), trial(1, None, 3.0, [2.0], "RUNNING")])
    trials = databases.Trials(path)
    assert [t.id for t in trials.update()] == ["id0", "id1"]
    assert trials.update() == []
    with contextlib.closing(sqlite3.connect(path)) as nni, nni:
        nni.execute(METRIC, ("id1", "1", "PERIODICAL", 1, '"1.5"'))
        nni.execute(METRIC, ("id1", "1", "FINAL", 0, '"61.0"'))
        nni.execute(EVENT, (9_500, "id1", "SUCCEEDED", None, 1))
    (changed,) = trials.update()
    assert (changed.status, changed.result) == ("SUCCEEDED", 61.0)
    assert changed.intermediate == [2.0, 1.5]
    assert changed.seconds == 7.5
    with contextlib.closing(sqlite3.connect(path)) as nni, nni:  # as a trial that is run again
        nni.execute("DELETE FROM MetricData WHERE trialJobId = 'id1' AND type <> 'FINAL'")
        nni.execute(EVENT, (9_600, "id1", "WAITING", None, 1))
        nni.execute(METRIC, ("id1", "1", "PERIODICAL", 0, '"4.0"'))
    changed = {trial.id: trial for trial in trials.update()}
    assert (changed["id1"].status, changed["id1"].intermediate) == ("WAITING", [4.0])
    assert changed["id0"].result == 60.0


def test_nni_can_write_while_a_search_is_read(tmp_path, monkeypatch):
    trials = databases.Trials(database(tmp_path, [trial(0, 60.0, None, [1.0] * 2500)]))
    with contextlib.closing(sqlite3.connect(trials.path, timeout=0, isolation_level=None)) as nni:
        nni.execute("PRAGMA synchronous = OFF")
        note_metric, written = trials.note_metric, []

        def write_and_note(*metric):
            written.append(nni.execute(METRIC, ("new", "1", "PERIODICAL", 0, '"1.5"')))
            return note_metric(*metric)

        monkeypatch.setattr(trials, "note_metric", write_and_note)
        (changed,) = trials.update()
    assert len(changed.intermediate) == 2500 < len(written)
