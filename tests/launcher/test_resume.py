"""A search is resumed exactly, whenever its manager or tuner was killed."""

import contextlib
import json
import os
import platform
import signal
import socket
import sqlite3
import subprocess
import sys
import types

import projects
import psutil
import pytest
import yaml
from conftest import ROOT, UPGRADE, ask, nobody, outside_address
from experiment import MANAGER, UNCHECKED, free_port, metric_value, parameters, processes_at
from held_trial import REPORTS, let_pass
from nni.experiment import rest
from nnis_manager import start_script
from waiting import wait_for

from nnisearch.before import config
from nnisearch.shared import place, processes
from nnisearch.start import locks, resume

TRIALS = 11
CONFIG = projects.CONFIG | {
    "trialCommand": f"python3 {ROOT / 'tests/support/held_trial.py'}",
    "maxTrialNumber": TRIALS,
    "tuner": {"name": "TPE", "classArgs": {"seed": 1}},  # the first sets are always the same
}


def reports(search, trial):
    """Return a trial's reports in their order, as pairs of their kind and value."""
    metrics = search.get(f"metric-data/{trial['trialJobId']}")
    return [(metric["type"], metric_value(metric)) for metric in metrics]


def wait_in_the_middle(search, number):
    """Wait until so many trials have ended, and the next two are in their middle."""
    let_pass(search.home, number)

    def is_there():
        trials = search.get("trial-jobs")
        running = [trial for trial in trials if trial["status"] == "RUNNING"]
        ended = [trial for trial in trials if "endTime" in trial]
        return (
            len(ended) == number and [len(reports(search, t)) >= 3 for t in running] == [True] * 2
        )

    wait_for(is_there)


def kill_manager(search):
    """Kill the manager of a search; return the processes of its trials."""
    found = []
    for process in processes_at(search.home):
        with contextlib.suppress(psutil.Error):
            if "NNI_TRIAL_JOB_ID" in process.environ():
                found.append(process)
    assert found
    (manager,) = processes_at(search.home, MANAGER)
    manager.kill()
    return found


def start_resuming(search, port, **variables):
    """Start the command that resumes a search, and do not wait."""
    return subprocess.Popen(
        [sys.executable, *UNCHECKED, "--resume", search.id, "-p", str(port), "--detach"],
        env=search.environment | variables,
        cwd=search.home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(search):
    """Return the events of a search's trials as NNI has stored them."""
    path = search.home / "nni-experiments" / search.id / "db" / "nni.sqlite"
    # Not read-only: what the killed manager has half written, SQLite takes back at the next look.
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
        rows = database.execute("select event from TrialJobEvent order by rowid")
        return [event for (event,) in rows]


# Lets the manager wait at a moment when it has queued the trials but not started them.
SLOW_TUNER = "import sys, time; time.sleep(600 * ('dispatcher.py' in ' '.join(sys.orig_argv)))"


def test_a_search_is_exact_however_it_ends(experiment, tmp_path):
    (tmp_path / "killed.yml").write_text(yaml.safe_dump(CONFIG))
    one = experiment(tmp_path / "killed.yml", trialCodeDirectory=str(tmp_path))
    home = one.home / "nni-experiments"

    wait_for(lambda: any(trial["status"] == "RUNNING" for trial in one.get("trial-jobs")))
    trials = kill_manager(one)  # at the first trial; the trials run on
    with (
        start_resuming(one, one.port) as first,
        start_resuming(one, free_port()) as second,
    ):
        printed = [process.communicate(timeout=240)[0] for process in (first, second)]
    # Whoever comes later is refused, or shows what the other has started.
    assert sorted([first.returncode, second.returncode]) in ([0, 0], [0, 1]), printed
    assert "Traceback" not in "".join(printed)
    assert not any(map(processes.lives, trials))
    (manager,) = processes_at(one.home, MANAGER)  # there is one only
    one.port = int(processes.argument_of(manager, "--port"))

    wait_in_the_middle(one, 2)
    kill_manager(one)
    before = len(events(one))
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_TUNER)
    path = f"{tmp_path / 'slow'}:{one.environment['PYTHONPATH']}"
    with start_resuming(one, one.port, PYTHONPATH=path) as broken:
        wait_for(lambda: "ADD_RESUMED" in events(one)[before:])
        (manager,) = processes_at(one.home, MANAGER)
        manager.kill()
        printed, _ = broken.communicate(timeout=120)
    assert broken.returncode in (0, 1), printed  # 0: it had just seen the manager's trials
    assert "Traceback" not in printed
    assert events(one)[-1] == "ADD_RESUMED"  # killed before the first trial was started anew
    one.resume()

    wait_in_the_middle(one, 4)
    one.nnictl("stop", one.id)
    before = events(one)
    shown = one.run(sys.executable, *UNCHECKED, "--view", one.id, "-p", one.port)
    assert f"Web UI: http://127.0.0.1:{one.port}, until: nnictl stop {one.id}" in shown
    assert one.get("check-status")["status"] == "VIEWED"
    assert len(one.get("trial-jobs")) == 6
    assert ask(one.port, address=outside_address()) is None
    assert ask(one.port, user=nobody()) == 403
    assert [ask(one.port, *UPGRADE, path=path) for path in ("/tuner", "/ws")] == [403, 403]
    assert one.get("check-status")["status"] == "VIEWED"
    assert one.stop() == []
    assert events(one) == before
    (home / ".experiment").unlink()  # a search is found without it
    (home / one.id).chmod(0o755)  # as an older version has left it
    one.resume()
    assert (home / one.id).stat().st_mode & 0o777 == 0o700

    wait_in_the_middle(one, 7)
    next(filter(processes.is_tuner, processes_at(one.home))).kill()
    wait_for(lambda: not processes_at(one.home, MANAGER))
    one.resume()

    wait_in_the_middle(one, TRIALS - 2)
    trials = kill_manager(one)
    let_pass(one.home, TRIALS)
    psutil.wait_procs(trials, timeout=120)  # the trials end
    one.resume()
    trials = one.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * TRIALS
    assert len({trial["sequenceId"] for trial in trials}) == TRIALS
    assert len({str(parameters(trial)) for trial in trials}) == TRIALS
    once = [("PERIODICAL", number) for number in range(REPORTS)] + [("FINAL", 0.5)]
    assert [reports(one, trial) for trial in trials] == [once] * TRIALS
    assert one.stop() == []


SLEEP = "import os, sys, time; {change}; print(flush=True); time.sleep(600)"


@pytest.fixture
def start_sleeper():
    """Start a process that sleeps, with the arguments given, as root or as another user."""
    sleepers = []

    def start_sleeper(*args, change="pass", **variables):
        command = [sys.executable, "-c", SLEEP.format(change=change), *args]
        environment = os.environ | variables
        sleepers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        sleepers[-1].stdout.readline()
        return sleepers[-1]

    yield start_sleeper
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.communicate()


def manager_arguments(id):
    return ["/somewhere/nni_node/main.js", "--port", "8090", "--experiment-id", id]


ENTRY = {"status": "RUNNING", "port": 8090, "logDir": "/nowhere"}  # of NNI's list


def write_list(home, listed):
    """Write NNI's list of experiments; return its path."""
    (home / "nni-experiments").mkdir()
    path = home / "nni-experiments" / ".experiment"
    path.write_text(json.dumps(listed))
    return path


def test_an_experiment_runs_if_its_manager_lives(start_sleeper, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    zombie = start_sleeper(*manager_arguments("zombie"))
    zombie.kill()
    wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    numbers = {
        "alive": start_sleeper(*manager_arguments("alive")).pid,
        "another": start_sleeper(*manager_arguments("alive")).pid,
        "recurred": start_sleeper("alive").pid,
        "zombie": zombie.pid,
        "gone": 2**22 + 1,
    }
    if os.getuid() == 0:
        change = f"os.setuid({nobody()})"
        feigned = start_sleeper(*manager_arguments("another user's"), change=change)
        numbers["another user's"] = feigned.pid
    write_list(tmp_path, {id: ENTRY | {"id": id, "pid": pid} for id, pid in numbers.items()})
    found = {id: entry["status"] for id, entry in resume.list_experiments().items()}
    assert found == dict.fromkeys(numbers, "STOPPED") | {"alive": "RUNNING"}


def test_a_viewed_or_prefixed_search_is_not_resumed(tmp_path):
    entry = {"id": "abc", "port": 8090, "status": "VIEWED", "prefixUrl": None}
    entry["logDir"] = str(tmp_path)
    with pytest.raises(ValueError, match="is abc, but it is only shown; allowed: "):
        resume.is_running(entry)
    entry |= {"status": "RUNNING", "prefixUrl": "nni/one"}
    with pytest.raises(ValueError, match="it runs at http://localhost:8090/nni/one; allowed: "):
        resume.is_running(entry)
    assert not resume.is_running(entry | {"status": "STOPPED"})
    assert resume.is_running(entry | {"prefixUrl": None})


@pytest.mark.parametrize("action", ["resume", "view"])
def test_what_has_been_resumed_meanwhile_is_not_touched(
    start_sleeper, tmp_path, monkeypatch, action
):
    id = f"abc{action}"  # the two run at once, and a resume ends what has its ID
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(resume, "STOPPING", 60)
    folder = tmp_path / id
    listed = write_list(tmp_path, {id: ENTRY | {"id": id}})
    stored = types.SimpleNamespace(id=id, action=action, folder=folder)
    trial = start_sleeper(NNI_EXP_ID=id)
    tuner = start_sleeper(NNI_LOG_DIRECTORY=f"{folder}/log")
    others = [
        start_sleeper("less", f"{folder}/log/nnimanager.log"),  # it only reads there
        start_sleeper(NNI_EXP_ID=f"{id}d"),
        start_sleeper(NNI_LOG_DIRECTORY=f"{folder}d/log"),
    ]
    manager = start_sleeper(*manager_arguments(id))
    with pytest.raises(ValueError, match=rf"^--{action} is {id}; allowed: one that does not run; "):
        resume.clear(stored)
    assert [process.poll() for process in (trial, tuner, manager)] == [None] * 3
    listed.write_text(listed.read_text().replace("RUNNING", "STOPPED"))  # by nnictl stop
    monkeypatch.setattr(resume.time, "sleep", lambda _: manager.kill())
    resume.clear(stored)
    left = [-signal.SIGTERM] * 2 if action == "resume" else [None] * 2
    assert [process.poll() for process in (trial, tuner)] == left
    assert [process.poll() for process in others] == [None] * 3


# As NNI's Python and its manager change their list.
CHANGE_BY_PYTHON = """
import json, os, sys
os.fsync = lambda opened, sync=os.fsync: (sync(opened), print("synced", flush=True))
from nnisearch.start.resume import Experiments
(id, entry), = json.loads(sys.argv[2]).items()
Experiments().update_experiment(id, "status", entry["status"])
"""
CHANGE_BY_NODE = """
const { fsyncSync } = fs;
fs.fsyncSync = (opened) => { fsyncSync(opened); console.log("synced"); };
fs.writeFileSync(process.argv[3], process.argv[4]);
process.exit();
"""


def start_python(code, *args, **how):
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **how)


@pytest.mark.parametrize(
    ("start", "code"),
    [(start_script, CHANGE_BY_NODE), (start_python, CHANGE_BY_PYTHON)],
    ids=["manager", "command"],
)
def test_nnis_list_is_whole_at_each_moment(tmp_path, environment, start, code):
    order = {"__symbol__": "path:os.system", "__args__": [f"touch {tmp_path}/run"]}
    entry = {"id": "abc", "logDir": "/", "tag": [order | {"__kwargs__": {}, "__nni_type__": 1}]}
    path = write_list(tmp_path, {"abc": entry | {"status": "RUNNING"}})
    before, after = path.read_text(), {"abc": entry | {"status": "STOPPED"}}
    (tmp_path / "who reads it meanwhile").hardlink_to(path)
    with start(code, path, json.dumps(after), env=environment | {"HOME": str(tmp_path)}) as changed:
        assert changed.communicate(timeout=60)[0].startswith("synced\n")
    assert path.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "run").exists()
    assert json.loads(path.read_text()) == after
    assert (tmp_path / "who reads it meanwhile").read_text() == before
    assert [file.name for file in path.parent.iterdir()] == [".experiment"]


def test_a_search_on_another_machine_is_not_touched(tmp_path, environment, monkeypatch):
    home = tmp_path / "nni-experiments"
    entry = ENTRY | {"id": "abc", "logDir": str(home)}
    write_list(tmp_path, {"abc": entry})
    folder = home / "abc"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    claim = """
        await new sql.SqlDB().init(true, process.argv[3]);
        console.log("locked");
        await new Promise((resolve) => process.stdin.on("end", resolve).resume());
    """
    note = folder / "manager.json"

    def runs_there(**changes):
        note.write_text(json.dumps(json.loads(own) | changes))
        return place.runs_on_other_host(folder)

    with start_script(claim, folder, stdin=subprocess.PIPE) as manager:
        assert manager.stdout.readline() == "locked\n"
        assert place.runs_on_other_host(folder) is None
        own = note.read_text()
        with start_script(claim, folder, stderr=subprocess.PIPE) as second:
            line = second.communicate(timeout=60)[1]
        assert line == f"Error: {folder}/manager.lock: another manager has locked it\n"
        assert second.returncode == 1
        rm = f"if a-box is gone: rm '{folder}'/manager.*"
        assert runs_there(host="a-box", namespace="") == (
            f"it runs on a-box; continue there, or, {rm}"
        )
        assert resume.list_experiments()["abc"]["status"] == "RUNNING"
        with pytest.raises(ValueError, match=r"^--resume is abc; allowed: one that runs "):
            resume.is_running(entry)
        note.write_text(own)
        manager.stdin.close()
        assert manager.wait(30) == 0
    assert not note.exists()
    assert runs_there(host="a-box", namespace="") is None  # nobody holds the lock
    assert runs_there(host=platform.node(), boot="") is None  # this machine was started anew
    # The lock of another machine may be invisible here.
    assert runs_there(host="a-box", boot="").startswith("it runs on a-box; ")


def test_a_line_tells_which_lock_the_command_waits_for(tmp_path, monkeypatch):
    path = tmp_path / "list.lock"
    (dated := tmp_path / "list.lock.7").touch()
    os.utime(dated, (2**32, 2**32))  # in the future
    said = []
    with (tmp_path / "start.lock").open("w") as other, (tmp_path / "start.lock").open() as own:
        assert locks.take(other)
        releases = [other.close, dated.unlink]

        def released(line):
            said.append(line)
            releases.pop(0)()

        monkeypatch.setattr(locks, "NOTICE", 0.1)
        monkeypatch.setattr(locks, "print", released, raising=False)
        with locks.held(own), locks.ListLock(str(path), stale=2):
            pass
    start, listed = said
    assert start.endswith(f"; to see it: fuser -v {locks.START_LOCK}")
    assert listed.endswith(f"; if it has ended: rm {path}.*")


def test_a_list_that_others_could_write_is_closed(tmp_path):
    path = write_list(tmp_path, {})
    path.chmod(0o664)
    path.parent.chmod(0o775)
    resume.close_list(path.parent)
    assert [file.stat().st_mode & 0o777 for file in (path.parent, path)] == [0o700, 0o600]


def test_a_damaged_list_is_not_changed(tmp_path, environment):
    path = write_list(tmp_path, {})
    path.write_text(damaged := '{"abc": {"id": "abc"')
    command = [sys.executable, "-m", "nnisearch.cli", "--resume", "abc"]
    how = {"env": environment | {"HOME": str(tmp_path)}, "capture_output": True, "text": True}
    result = subprocess.run(command, **how)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nnisearch: error: {path} is damaged; allowed: ")
    assert path.read_text() == damaged


GOOD = CONFIG | {"trialCodeDirectory": "/"}


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ("{", "Expecting property name"),
        ("null", "its configuration is None; allowed: an object"),
        ("{}", "platform in trainingService is None"),
        (json.dumps(GOOD | {"trialConcurrency": 0}), "trialConcurrency is 0; allowed: "),
        (json.dumps(GOOD | {"another": 3}), "another is no key of the configuration"),
        (json.dumps(GOOD | {"searchSpace": {"__symbol__": 1}}), "no key that runs code"),
    ],
)
def test_an_experiment_whose_configuration_is_damaged(tmp_path, params, part):
    path = tmp_path / "abc" / "db" / "nni.sqlite"
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        columns = "id text, params text, revision integer"
        database.execute(f"CREATE TABLE ExperimentProfile ({columns})")
        database.execute("INSERT INTO ExperimentProfile VALUES ('abc', ?, 1)", [params])
    with pytest.raises(ValueError) as error:
        config.load_stored("abc", tmp_path / "abc")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("experiment abc")
    assert str(path) in str(error.value)
    assert part in str(error.value)


def test_a_manager_that_does_not_answer_is_reported(monkeypatch):
    monkeypatch.setattr(rest, "timeout", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        entry = {"id": "abc", "pid": 4000000, "port": silent.getsockname()[1]}
        with pytest.raises(ValueError) as error:
            resume.running_config(entry)
    line = str(error.value)
    assert line.startswith("--resume is abc; allowed: one that answers; its manager, process 4000")
    assert line.endswith("kill -CONT 4000000 if it is stopped, or kill -9 4000000 and this again")
    assert "\n" not in line
