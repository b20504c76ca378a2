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
from functools import partial
from pathlib import Path

import nni_node
import projects
import psutil
import pytest
import yaml
from conftest import ROOT, ask, nobody, outside_address
from experiment import MANAGER, UNCHECKED, free_port, metric_value, parameters, processes_at
from filelock import FileLock
from held_trial import REPORTS, let_pass
from nni.experiment import rest
from waiting import wait_for

from nnisearch.before import config
from nnisearch.shared import place, processes
from nnisearch.start import patches
from nnisearch.start import resume as recovery

TRIALS = 9
CONFIG = projects.CONFIG | {
    "trialCommand": f"python3 {ROOT / 'tests/support/held_trial.py'}",
    "maxTrialNumber": TRIALS,
    "tuner": {"name": "Random", "classArgs": {"seed": 1}},
}


def trial_processes(search):
    """Return the processes of a search's trials: Python, and the shell that NNI starts."""
    found = []
    for process in processes_at(search.home):
        with contextlib.suppress(psutil.Error):
            if "NNI_TRIAL_JOB_ID" in process.environ():
                found += [process, process.parent()]
    return found


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
    trials = trial_processes(search)
    assert trials
    (manager,) = processes_at(search.home, MANAGER)
    manager.kill()
    return trials


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


def assert_is_exact(search):
    """Assert that a search comes to its end with all that was asked for, each once."""
    trials = search.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * TRIALS
    assert len({trial["sequenceId"] for trial in trials}) == TRIALS
    assert len({str(parameters(trial)) for trial in trials}) == TRIALS
    once = [("PERIODICAL", number) for number in range(REPORTS)] + [("FINAL", 0.5)]
    assert [reports(search, trial) for trial in trials] == [once] * TRIALS
    assert search.stop() == []


@pytest.fixture
def search(tmp_path, experiment):
    """Start the search above with changes; of which nothing is left when the test ends."""
    (tmp_path / "killed.yml").write_text(yaml.safe_dump(CONFIG))
    return partial(experiment, tmp_path / "killed.yml", trialCodeDirectory=str(tmp_path))


# Lets the manager wait at a moment when it has queued the trials but not started them.
SLOW_TUNER = "import sys, time; time.sleep(600 * ('dispatcher.py' in ' '.join(sys.orig_argv)))"


def test_a_search_whose_manager_is_killed_is_exact(search, tmp_path):
    one = search()
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
    arguments = manager.cmdline()
    one.port = int(arguments[arguments.index("--port") + 1])

    wait_in_the_middle(one, 3)
    trials = kill_manager(one)
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
    assert not any(map(processes.lives, trials))

    wait_in_the_middle(one, TRIALS - 2)
    trials = kill_manager(one)
    let_pass(one.home, TRIALS)
    psutil.wait_procs(trials, timeout=120)  # the trials end
    one.resume()
    assert_is_exact(one)


def test_a_search_that_is_stopped_or_loses_its_tuner_is_exact(search):
    one = search(tuner={"name": "TPE"})
    wait_in_the_middle(one, 0)
    trials = kill_manager(one)
    let_pass(one.home, 2)
    psutil.wait_procs(trials, timeout=120)
    one.resume()

    home = one.home / "nni-experiments"
    wait_in_the_middle(one, 2)
    one.nnictl("stop", one.id)
    before = events(one)
    shown = one.run(sys.executable, *UNCHECKED, "--view", one.id, "-p", one.port)
    assert f"Web UI: http://127.0.0.1:{one.port}, until: nnictl stop {one.id}" in shown
    assert one.get("check-status")["status"] == "VIEWED"
    assert len(one.get("trial-jobs")) == 4
    assert ask(one.port, address=outside_address()) is None
    assert ask(one.port, user=nobody()) == 403
    assert one.stop() == []
    assert events(one) == before
    (home / ".experiment").unlink()  # a search is found without it
    (home / one.id).chmod(0o755)  # as an older version has left it
    one.resume()
    assert (home / one.id).stat().st_mode & 0o777 == 0o700

    wait_in_the_middle(one, 4)
    assert one.stop() == []
    one.resume()

    wait_in_the_middle(one, 6)
    next(filter(processes.is_tuner, processes_at(one.home))).kill()
    wait_for(lambda: not processes_at(one.home, MANAGER))
    let_pass(one.home, TRIALS)
    one.resume()
    assert_is_exact(one)


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
    found = {id: known["status"] for id, known in recovery.list_experiments().items()}
    assert found == dict.fromkeys(numbers, "STOPPED") | {"alive": "RUNNING"}


def test_a_viewed_or_prefixed_search_is_not_resumed(tmp_path):
    known = {"id": "abc", "port": 8090, "status": "VIEWED", "prefixUrl": None}
    known["logDir"] = str(tmp_path)
    with pytest.raises(
        ValueError, match="is abc, but it is only shown, by --view or nnictl view; allowed: "
    ):
        recovery.is_running(known)
    known |= {"status": "RUNNING", "prefixUrl": "nni/one"}
    with pytest.raises(ValueError, match="it runs at http://localhost:8090/nni/one; allowed: "):
        recovery.is_running(known)
    assert not recovery.is_running(known | {"status": "STOPPED"})
    assert recovery.is_running(known | {"prefixUrl": None})


def test_a_process_that_only_reads_an_experiments_files_is_not_ended(start_sleeper, tmp_path):
    folder = tmp_path / "abc"
    start_sleeper("less", f"{folder}/log/nnimanager.log")
    start_sleeper(NNI_EXP_ID="abcd")
    assert processes.processes_of("abc", folder) == set()


def test_a_resume_ends_the_tuner_that_a_dying_manager_has_left(
    start_sleeper, tmp_path, monkeypatch
):
    left = start_sleeper(NNI_LOG_DIRECTORY=f"{tmp_path}/abc/log")
    other = start_sleeper(NNI_LOG_DIRECTORY=f"{tmp_path}/abcd/log")
    noted = []
    experiments = types.SimpleNamespace(update_experiment=lambda *change: noted.append(change))
    monkeypatch.setattr(recovery, "Experiments", lambda: experiments)
    recovery.prepare({"id": "abc", "logDir": str(tmp_path), "status": "RUNNING"})
    assert left.wait(0) == -signal.SIGTERM
    assert other.poll() is None
    assert noted == [("abc", "status", "STOPPED")]


@pytest.mark.parametrize(
    "listed",
    [[], [1], 3, "text", None, {"abc": 3}, {"abc": {}}, {"abc": ENTRY}, {"abc": {"id": 3} | ENTRY}],
    ids=str,
)
def test_a_damaged_list_is_refused(tmp_path, monkeypatch, listed):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_list(tmp_path, listed)
    with pytest.raises(ValueError, match=rf"^{path} is damaged.*; allowed: .*$"):
        recovery.list_experiments()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"\.experiment is damaged: it is no file; allowed: "):
        recovery.list_experiments()


NODE = Path(nni_node.__path__[0]).resolve() / "node"
# As NNI's manager and its Python change their list.
CHANGE_BY_NODE = f"""
const fs = require("fs");
require({str(ROOT / "nnisearch" / "manager" / "pace.js")!r})({{mode: "local", python: "python3"}});
const {{ fsyncSync }} = fs;
fs.fsyncSync = (opened) => {{ fsyncSync(opened); console.log("synced"); }};
fs.writeFileSync(process.argv[1], process.argv[2]);
"""
CHANGE_BY_PYTHON = """
import json, os, sys
os.fsync = lambda opened, sync=os.fsync: (sync(opened), print("synced"))
from nnisearch.start.resume import Experiments
(id, known), = json.loads(sys.argv[2]).items()
Experiments().update_experiment(id, "status", known["status"])
"""


@pytest.mark.parametrize(
    "change",
    [[NODE, "-e", CHANGE_BY_NODE], [sys.executable, "-c", CHANGE_BY_PYTHON]],
    ids=["manager", "command"],
)
def test_nnis_list_is_whole_at_each_moment(tmp_path, environment, change):
    code = {"__symbol__": "path:os.system", "__args__": [f"touch {tmp_path}/run"]}
    known = {"id": "abc", "logDir": "/", "tag": [code | {"__kwargs__": {}, "__nni_type__": 1}]}
    path = write_list(tmp_path, {"abc": known | {"status": "RUNNING"}})
    before, after = path.read_text(), {"abc": known | {"status": "STOPPED"}}
    (tmp_path / "who reads it meanwhile").hardlink_to(path)
    how = {"env": environment | {"HOME": str(tmp_path)}, "cwd": ROOT, "text": True}
    printed = subprocess.check_output([*change, path, json.dumps(after)], **how)
    assert printed == "synced\nsynced\n"  # the file and its folder
    assert path.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "run").exists()
    assert json.loads(path.read_text()) == after
    assert (tmp_path / "who reads it meanwhile").read_text() == before
    assert [file.name for file in path.parent.iterdir()] == [".experiment"]


# As NNI's manager, which has two experiments on its list; it says whether they have crashed.
STAND_IN = f"""
const [folder, root] = process.argv.slice(1);
const place = require({str(ROOT / "nnisearch" / "manager" / "place.js")!r});
const changes = place({{folder, action: "resume"}}, root);
class ExperimentsManager {{ async checkCrashed() {{ return {{isCrashed: true}}; }} }}
changes["extensions/experiments_manager/manager.js"]({{ExperimentsManager}});
const list = new ExperimentsManager();
require("net").createServer().listen(0, "127.0.0.1", async () => {{
    const [own, other] = [await list.checkCrashed("abc"), await list.checkCrashed("other")];
    console.log(own.isCrashed, other.isCrashed);
}});
process.stdin.on("end", () => process.exit(0)).resume();
"""


def test_a_search_on_another_machine_is_not_touched(tmp_path, environment, monkeypatch):
    home = tmp_path / "nni-experiments"
    known = {id: ENTRY | {"id": id, "logDir": str(home)} for id in ("abc", "other")}
    write_list(tmp_path, known)
    (home / "abc").mkdir()
    (home / "other").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    note, there = home / "abc" / "manager.json", home / "other" / "manager.json"
    elsewhere = json.dumps({"host": "box", "boot": "another", "namespace": "pid:[1]"})
    there.write_text(elsewhere)
    command = [NODE, "-e", STAND_IN, home / "abc", NODE.parent]
    how = {"env": environment | {"HOME": str(tmp_path)}, "text": True, "stdin": subprocess.PIPE}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **how) as manager:
        assert manager.stdout.readline() == "true false\n"
        assert place.elsewhere(home / "abc") is None
        with subprocess.Popen(command, **how) as second:
            assert (second.wait(30), second.stdout.read()) == (1, "")
            line = second.stderr.read()
            assert line.startswith(f"Error: {home}/abc/manager.lock: another manager has locked it")
        own = note.read_text()
        note.write_text(elsewhere)
        statuses = {id: known["status"] for id, known in recovery.list_experiments().items()}
        assert statuses == {"abc": "RUNNING", "other": "STOPPED"}
        with pytest.raises(ValueError) as error:
            recovery.is_running(known["abc"])
        assert "is abc; allowed: one that runs here, or not at all; it runs on box:" in str(
            error.value
        )
        assert f"if that is gone: rm '{home}/abc'/manager.*" in str(error.value)
        note.write_text(own)
        manager.stdin.close()
        assert manager.wait(30) == 0
    assert not note.exists()
    assert place.elsewhere(home / "other") is None  # it was killed: nobody holds the lock
    partition = types.SimpleNamespace(mountpoint="/", fstype="nfs4", opts="rw,local_lock=all")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [partition])
    assert place.elsewhere(home / "other").startswith("it runs on box:")  # who knows
    there.write_text(elsewhere.replace("box", platform.node()))
    assert place.elsewhere(home / "other") is None  # this machine has been started anew


def test_a_line_tells_which_lock_the_command_waits_for(tmp_path, monkeypatch):
    start, path = tmp_path / "start.lock", tmp_path / "list.lock"
    (dated := tmp_path / "list.lock.7").touch()
    os.utime(dated, (2**32, 2**32))  # in the future
    (held := FileLock(start)).acquire()
    said = []

    def released(line):
        said.append(line)
        held.release()
        dated.unlink(missing_ok=True)

    monkeypatch.setattr(patches, "NOTICE", 0.1)
    monkeypatch.setattr(patches, "print", released, raising=False)
    with patches.ListLock(str(path), stale=2), patches.StartLock(start):
        assert len(said) == 1
    (line,) = said
    assert line.endswith(f"; if it has ended: rm {path}.*")
    held.acquire()
    with patches.StartLock(start):
        assert said[1].endswith(f"; to see it: fuser -v {start}")


def test_a_list_that_others_could_write_is_closed(tmp_path):
    path = write_list(tmp_path, {})
    path.chmod(0o664)
    path.parent.chmod(0o775)
    recovery.close_list(path.parent)
    assert [file.stat().st_mode & 0o777 for file in (path.parent, path)] == [0o700, 0o600]


def test_a_damaged_list_is_not_changed(tmp_path, environment):
    path = write_list(tmp_path, {})
    path.write_text(damaged := '{"abc": {"id": "abc"')
    command = [sys.executable, "-m", "nnisearch.cli", "--resume", "abc"]
    how = {"env": environment | {"HOME": str(tmp_path)}, "capture_output": True, "text": True}
    result = subprocess.run(command, **how)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nnisearch: error: {path} is not JSON: ")
    assert path.read_text() == damaged


GOOD = CONFIG | {"trialCodeDirectory": "/"}


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ("{", "Expecting property name"),
        ("[]", "its configuration is []; allowed: an object"),
        ("null", "its configuration is None; allowed: an object"),
        ("{}", "trainingService is not set"),
        (json.dumps(GOOD | {"trialConcurrency": 0}), "trialConcurrency is 0; allowed: "),
        (json.dumps(GOOD | {"trialCodeDirectory": "/no/such"}), "/no/such"),
        (json.dumps(GOOD | {"tuner": {"name": 3}}), "name"),
        (json.dumps(GOOD | {"another": 3}), "another is no key of NNI's ExperimentConfig"),
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
        known = {"id": "abc", "pid": 4000000, "port": silent.getsockname()[1]}
        with pytest.raises(ValueError) as error:
            recovery.running_config(known)
    line = str(error.value)
    assert line.startswith("--resume is abc; allowed: one that answers; its manager, process 4000")
    assert line.endswith("kill -CONT 4000000 if it is stopped, or kill -9 4000000 and this again")
    assert "\n" not in line
