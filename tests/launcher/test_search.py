"""search.py: starts, failed starts that leave nothing, and the default configuration."""

import contextlib
import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import (
    LIGHT_TRIAL,
    ROOT,
    SPACE,
    as_process,
    ask,
    nobody,
    outside_address,
    read_until,
)
from experiment import (
    MANAGER,
    UNCHECKED,
    assert_nothing_is_left,
    free_port,
    kill_at,
    processes_at,
)
from stand_ins import stand_in_nvidia_smi
from waiting import wait_for

import search
from nnisearch import cli
from nnisearch.start import launch, locks

DEMO = yaml.safe_load((ROOT / "configs" / "demo.yml").read_text())


def demo(**changes):
    """Return configs/demo.yml with changes, for a tuner and trials that start at once."""
    light = {
        "tuner": {"name": "Random"},
        "trialCodeDirectory": str(ROOT),
        "trialCommand": LIGHT_TRIAL,
        "searchSpace": SPACE,
    }
    return DEMO | light | changes


def refusal(result):
    """Return the one line with which search.py refused, having started and left nothing."""
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("search.py: error: ")
    return line


# The start


# A notebook's output is no TextIOWrapper, and `python -OO` keeps no docstrings.
NOTEBOOK = """
import io, sys
sys.stdout = io.StringIO()
import search
status = search.cli.main(project=search.PROJECT)
sys.__stdout__.write(sys.stdout.getvalue())
sys.exit(status)
"""


def test_a_search_in_the_foreground(run_search, home):
    port = free_port()
    result = run_search("-p", port, "--keep-going", config=demo(maxTrialNumber=3))
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    (id,) = re.findall(r"^Search (\w+): demo on synthetic images$", result.stdout, re.MULTILINE)
    assert f"Web UI: http://127.0.0.1:{port}, until: nnictl stop {id}" in printed
    assert sum(line.startswith("trial ") and "; best " in line for line in printed) == 3
    assert "3 of 3 trials have a result" in printed
    assert printed[-1] == f"To keep the choice: python choose.py {id} --out best.json"
    assert "%|" not in result.stderr  # no progress bar without a terminal
    listed = home / "nni-experiments" / ".experiment"
    assert [path.stat().st_mode & 0o77 for path in (listed, listed.parent)] == [0, 0]
    nnictl = run_search("experiment", "list", how=["-m", "nni.tools.nnictl.nnictl"])
    assert id in nnictl.stdout
    line = refusal(run_search("--resume", id, "--listen", "127.0.0.1"))
    assert "--listen is 127.0.0.1; allowed: only at a start" in line
    listed.rename(listed.with_name("lost"))
    again = run_search("--resume", id, how=["-OO", "-c", NOTEBOOK])  # watches what still runs
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-8:] == printed[-8:]  # the table and what is below it


# Node loads this before NNI's manager, if a user names it in NODE_OPTIONS.
PRELOADS = {
    "slow": "Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20000)",
    "dead": "console.error('the library is broken'); process.exit(3)",
}


def preload(home, name):
    """Write a file that acts in NNI's manager only; return NODE_OPTIONS for it."""
    path = home / "a preload.js"
    path.write_text(f"if (process.argv[1]?.endsWith('main.js')) {{ {PRELOADS[name]} }}")
    return f'--require "{path}"'


def test_a_web_server_that_needs_twenty_seconds_is_waited_for(run_search, home):
    options = preload(home, "slow")
    command = f"printenv NODE_OPTIONS; {LIGHT_TRIAL}"
    config = demo(trialCommand=command, maxTrialNumber=1)
    result = run_search("-p", free_port(), config=config, how=UNCHECKED, NODE_OPTIONS=options)
    assert result.returncode == 0, result.stderr
    (stdout,) = home.glob("nni-experiments/_latest/trials/*/stdout")
    given, *_ = stdout.read_text().splitlines()
    assert given == options  # the user's own, and nothing of search.py's


def test_a_web_server_that_dies_is_not_waited_for_and_leaves_nothing(run_search, home):
    dead = preload(home, "dead")
    result = run_search("-p", free_port(), config=demo(), how=UNCHECKED, NODE_OPTIONS=dead)
    assert result.returncode == 1
    error = "search.py: error: the search does not start: NNI's web server has ended"
    assert error in result.stderr
    assert "the library is broken" in result.stderr
    assert "Traceback" not in result.stderr
    assert_nothing_is_left(home)


def test_a_resume_that_fails_keeps_the_search(run_search, home):
    listed = home / "nni-experiments" / ".experiment"
    path = home / "nni-experiments" / "abc" / "db" / "nni.sqlite"
    path.parent.mkdir(parents=True)
    log = home / "nni-experiments" / "abc" / "log" / "nnictl_stderr.log"
    log.parent.mkdir()
    log.write_text("Error: of an earlier start\n")
    known = {"id": "abc", "port": 8090, "status": "STOPPED", "logDir": str(listed.parent)}
    listed.write_text(json.dumps({"abc": known}))
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        columns = "id text, params text, revision integer"
        database.execute(f"CREATE TABLE ExperimentProfile ({columns})")
        database.execute("INSERT INTO ExperimentProfile VALUES ('abc', ?, 1)", [json.dumps(demo())])
    dead = preload(home, "dead")
    result = run_search("--resume", "abc", "-p", free_port(), NODE_OPTIONS=dead)
    assert result.returncode == 1
    assert "the search does not start: NNI's web server has ended" in result.stderr
    assert "earlier" not in result.stderr
    assert json.loads(listed.read_text()) == {"abc": known}
    assert path.exists()


def test_names_and_errors_are_printed_without_control_characters(tmp_path, monkeypatch, capsys):
    named = types.SimpleNamespace(experiment_name="\x1b[31mred")
    monkeypatch.setattr(cli, "begin", lambda *_: ("abc", 8090, named))
    result = as_process(capsys, cli.main, ["config.yml", "--detach"])
    assert result.stdout.startswith("Search abc: red\n")
    monkeypatch.undo()
    path = tmp_path / "\x1b[31mred.yml"
    path.write_text(yaml.safe_dump(demo(trialComand="\x1b[31mred")))
    result = as_process(capsys, cli.main, [str(path)], search.PROJECT)
    assert "trialcomand is no key of" in refusal(result)
    assert "red.yml" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_is_ended_leaves_nothing(start_search, home, number):
    slow = preload(home, "slow")
    with start_search(config=demo(), how=UNCHECKED, NODE_OPTIONS=slow) as process:
        wait_for(lambda: process.poll() is not None or processes_at(home, MANAGER))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=240)
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert stderr == "search.py: interrupted; no search has started\n"
    assert_nothing_is_left(home)


# Starts a search, and is killed while the lock of starts is held.
RESUMING = """
import sys, time
from pathlib import Path
from nnisearch.start.locks import held
from nnisearch.start.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), "resume") as watchdog, held(watchdog.lock):
    watchdog.note_start()
    print("started", flush=True)
    time.sleep(600)
"""


def test_no_other_start_begins_before_a_killed_one_is_undone(start_search, home):
    folder = home / "nni-experiments" / "abc"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    command = [sys.executable, "-c", deaf, MANAGER, "--experiment-id", "abc"]
    manager = subprocess.Popen(command, env=os.environ | {"HOME": str(home)})
    with start_search(folder, how=["-c", RESUMING]) as process:
        read_until(process, "started")
        process.kill()
    with (home / "nni-experiments" / ".nnisearch.lock").open() as lock, locks.held(lock):
        assert manager.wait(1) == -signal.SIGKILL
    assert folder.exists()


# Simulates Ctrl-C during the import of NNI, which a test could not time.
IMPORTING = """
import os, signal, sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "nni.experiment":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
signal.signal(signal.SIGINT, signal.default_int_handler)
import search
"""


def test_ctrl_c_during_the_import_of_nni_is_silent(environment):
    command = [sys.executable, "-c", IMPORTING]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_a_refusal_leaves_no_folder_in_a_home(run_search, home):
    missing = home / "missing" / "home"
    assert "--resume is 'x'; allowed: none" in refusal(run_search("--resume", "x", HOME=missing))
    config = demo(trialConcurrency=0)
    assert "trialConcurrency" in refusal(run_search(config=config, HOME=str(missing)))
    assert not missing.parent.exists()


def test_a_read_only_home_is_refused(run_search, home):
    (home / "file").touch()
    line = refusal(run_search(config=demo(), HOME=str(home / "file")))
    folder = f"{home}/file/nni-experiments"
    assert f"NNI's folder below HOME is '{folder}'; allowed: a folder to write to; Not a" in line


def test_a_folder_that_others_can_write_to_is_refused_and_left_as_it_was(run_search, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    line = refusal(run_search(config=demo(experimentWorkingDirectory=str(folder))))
    assert f"experimentWorkingDirectory is '{folder}'; allowed: a folder that, like its p" in line
    assert list(folder.iterdir()) == []


def test_a_full_disk_refuses_a_search_and_leaves_nothing(run_search, home, tmpfs):
    folder = tmpfs(400, "disk")
    config = demo(experimentWorkingDirectory=str(folder))
    line = refusal(run_search(config=config))
    assert f"experimentWorkingDirectory is '{folder}'; allowed: a folder with 50 MB free; " in line
    (folder / "fill").write_bytes(b"0" * (os.statvfs(folder).f_bavail * 4096 - 8192))
    result = run_search("-p", free_port(), config=config, how=UNCHECKED)
    assert result.returncode == 1
    assert "search.py: error: the search does not start: " in result.stderr
    assert "Traceback" not in result.stderr
    assert processes_at(home) == []
    assert [path.name for path in folder.iterdir()] == ["fill"]


def test_a_disk_that_the_first_trial_fills_is_named(run_search, home, tmpfs):
    folder = tmpfs(60_000, "disk")
    fill = "head -c 100M /dev/zero > $NNI_OUTPUT_DIR/file"
    config = demo(experimentWorkingDirectory=str(folder), trialCommand=fill)
    line = refusal(run_search(config=config))
    assert "/disk/" in line
    assert "allowed: a folder with 50 MB free; 0 MB are" in line
    assert list(folder.iterdir()) == []


def test_concurrent_searches_get_different_ports_and_outlive_their_commands(
    start_search, run_search, home
):
    config = demo(maxTrialNumber=1, trialCommand="sleep 600")
    other = home / "of another user"  # who has a lock of his own
    other.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(kill_at, other)
        how = {"config": config, "how": UNCHECKED}
        starts = [start_search(HOME=str(at), **how) for at in (home, home, other)]
        commands = [stack.enter_context(start) for start in starts]
        lines = [read_until(command, "Web UI") for command in commands]
        found = [re.search(r"127.0.0.1:(\d+), until: nnictl stop (\w+)", line) for line in lines]
        ports, ids = zip(*(match.groups() for match in found), strict=True)
        assert len({*ports}) == 3
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
        for command, number in zip(commands, signals, strict=True):
            command.send_signal(number)
        printed, errors = zip(*(each.communicate(timeout=60) for each in commands), strict=True)
        assert commands[0].returncode == 1
        again = f"The search continues. To watch it again: python search.py --resume {ids[0]}"
        assert again in printed[0]
        assert "Traceback" not in "".join(errors)
        assert [ask(port) for port in ports] == [200] * 3
        line = refusal(run_search("-p", ports[0], **how))
    assert f"--port is {ports[0]}; allowed: a free one; nnictl experiment list " in line


def test_a_full_home_refuses_a_search_and_keeps_nnis_list(run_search, home, tmpfs, tmp_path):
    full = tmpfs(200, "full home")
    (full / "nni-experiments").mkdir()
    listed = full / "nni-experiments" / ".experiment"
    listed.write_text("{}")
    (full / "fill").write_bytes(b"0" * (os.statvfs(full).f_bavail * 4096 - 4096))
    (tmp_path / "elsewhere").mkdir()
    config = demo(experimentWorkingDirectory=str(tmp_path / "elsewhere"))
    line = refusal(run_search(config=config, HOME=str(full)))
    assert f"folder below HOME is '{full}/nni-experiments'; allowed: a folder with 1 MB" in line
    assert listed.read_text() == "{}"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_only_listen_opens_the_web_ui_to_other_machines(run_search):
    address = outside_address()
    config = demo(maxTrialNumber=1, trialCommand="sleep 600")
    port = free_port()
    listen = ["-p", port, "--listen", address, "--detach"]
    result = run_search(*listen, config=config, how=UNCHECKED)
    assert result.returncode == 0, result.stderr
    assert f"Web UI: http://{address}:{port}" in result.stdout
    warning = f"Warning: everybody who reaches {address}:{port} can run any command as you"
    assert warning in result.stdout
    assert ask(port, address=address, user=nobody()) == 200
    assert ask(port, user=nobody()) == 403  # the loopback address is not opened


# The command line, the default configuration, and the data


@pytest.mark.parametrize("args", [["x.yml"], ["-c", "x.yml"], ["create", "--config", "x.yml"]])
def test_a_configuration_may_be_named_as_for_nnictl(args):
    assert cli.parse_args(args, "nnisearch", cli.Project()).config == Path("x.yml")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "one of the arguments CONFIG -c/--config --resume --view is required"),
        (["x.yml", "-c", "y.yml"], "argument -c/--config: not allowed with argument CONFIG"),
        (["--resume", "a", "x.yml"], "argument CONFIG: not allowed with argument --resume"),
        (["--resume", "a", "--view", "a"], "argument --view: not allowed with argument --resume"),
        (["x.yml", "-p", "65536"], "--port is 65536; allowed: 1 to 65535"),
        (["x.yml", "--host", "a"], "--host is a; allowed: none, without --listen"),
        (["x.yml", "--listen", "1.2.3.4"], "--listen is 1.2.3.4; allowed: an IPv4 address of this"),
        (["x.yml", "--no-rehearsal"], "unrecognized arguments: --no-rehearsal"),
    ],
)
def test_flags_that_are_not_allowed_are_refused_in_one_line(capsys, args, part):
    result = as_process(capsys, cli.parse_args, args, "nnisearch", cli.Project())
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nnisearch: error: {part}")


def test_help_names_the_default_configuration(capsys):
    result = as_process(capsys, cli.parse_args, ["--help"], "search.py", search.PROJECT)
    words = " ".join(result.stdout.split())
    assert "NNI (default: config.yml with GPUs, configs/cpu.yml without)" in words


def test_a_port_that_only_root_may_open_is_not_called_taken(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(launch.socket, "create_server", refuse)
    with pytest.raises(ValueError, match="--port is 80; allowed: 1024 or more, since you may not"):
        launch.find_port(80)


def test_a_folder_with_a_name_too_long_for_sqlite_is_refused(tmp_path):
    folder = tmp_path / "/".join(["x" * 200] * 3)
    long = types.SimpleNamespace(experiment_working_directory=str(folder))
    with pytest.raises(ValueError, match="allowed: a path of at most 480 bytes"):
        cli.check(long, search.PROJECT)


def test_a_python_that_is_not_the_users_is_named(tmp_path, monkeypatch, capsys):
    config = types.SimpleNamespace(trial_command="python3 trial.py")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    cli.name_python(config)
    assert capsys.readouterr().out == ""
    (tmp_path / "python3").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cli.name_python(config)
    line = capsys.readouterr().out
    assert line.startswith(f"In trialCommand python3 is {Path(sys.executable).parent}/python3")
    assert f"write {tmp_path}/python3 in trialCommand" in line


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        ("python3 train.py --dataset synthetic --data-dir /x", ("synthetic", "/x")),
        ("torchrun --nproc 2 train.py --data-dir=x > log", ("cifar10", f"{ROOT}/x")),
        ("python3 train.py --data-dir $WHERE --epochs $N", None),  # what the shell makes of it
        ("python3 trial.py --data-dir x", None),
    ],
)
def test_train_pys_data_is_loaded_with_the_flags_of_the_trial(monkeypatch, command, loaded):
    import train

    seen = []
    monkeypatch.setattr(train, "load_data", lambda args: seen.append(args))
    search.load_data(types.SimpleNamespace(trial_code_directory=ROOT, trial_command=command))
    assert [(args.dataset, str(args.data_dir)) for args in seen] == [loaded] * bool(loaded)


def test_data_that_cannot_be_loaded_is_refused_before_nni_starts(run_search, home):
    command = "python3 train.py --data-dir /proc/nowhere"
    config = demo(trialCommand=command, searchSpace=SPACE)
    assert "/proc/nowhere" in refusal(run_search(config=config))
    assert not list(home.glob("nni-experiments/*/log"))


def test_the_default_is_config_yml_with_gpus_and_says_who_holds_them(start_search, home):
    stand_in_nvidia_smi(home, busy=[True, True])
    path = f"{home}:{os.environ['PATH']}"
    with start_search("-p", free_port(), how=UNCHECKED, PATH=path) as process:
        chosen = process.stdout.readline()
        waiting = read_until(process, "trials wait for a GPU")
    assert chosen == "Configuration: config.yml, since nvidia-smi lists 2 GPUs\n"
    holder = f"{psutil.Process(1).name()} (1, root)"
    assert waiting == f"trials wait for a GPU: GPU 0: {holder}; GPU 1: {holder}\n"


def test_the_default_without_gpus_is_cpu_yml(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert search.default_config() == (
        ROOT / "configs" / "cpu.yml",
        "configs/cpu.yml, since nvidia-smi lists no GPUs",
    )
