"""Trials over SSH: machines on loopback addresses are tried, lost and used again."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import LIGHT_TRIAL, SPACE
from experiment import MANAGER, SEARCH, metric_value, parameters, processes_at
from machines import PASSPHRASE, SSHD, Machine, make_key, make_program, make_ssh
from nni.experiment.config import ExperimentConfig
from waiting import wait_for

from nnisearch import elsewhere
from nnisearch.elsewhere import over_ssh

pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd, Debian's openssh-server")


@pytest.fixture
def ssh(tmp_path, environment, monkeypatch):
    """An ssh on the PATH that knows the machines of this test, and nothing of this user's."""
    folder = make_ssh(tmp_path / "ssh")
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    monkeypatch.setenv("PATH", environment["PATH"])
    return folder


@pytest.fixture
def key(tmp_path):
    make_key(tmp_path / "key", PASSPHRASE)
    return tmp_path / "key"


@pytest.fixture
def machine(tmp_path, key, ssh):
    """Start machines, and end them after the test."""
    machines = []

    def machine(address="127.0.0.2", environment=(), key=key, **how):
        folder = tmp_path / f"machine{len(machines)}"
        machines.append(Machine(address, folder, key, ssh, environment, **how))
        machines[-1].settings["sshPassphrase"] = PASSPHRASE
        return machines[-1]

    yield machine
    for each in machines:
        each.die()


@pytest.fixture
def prepared(tmp_path):
    """Prepare a search whose trials run a command on machines; return what starts a trial of it."""
    code, folder = tmp_path / "code", tmp_path / "experiment"
    code.mkdir()
    (folder / "log").mkdir(parents=True)
    started = []

    def prepared(settings, command="true", **changes):
        service = {"platform": "remote", "machineList": settings}
        values = {"searchSpace": {}, "tuner": {"name": "Random"}, "trialConcurrency": 1}
        values |= {"trialCommand": command, "trialCodeDirectory": str(code)} | changes
        config = ExperimentConfig(training_service=service, nni_manager_ip="x", **values)
        config = config.canonical_copy()
        id = secrets.token_hex(4)  # two tests at a time do not end each other's trials
        elsewhere.prepare(config, id, folder, False)
        assert config.canonical_copy().training_service.platform == "local"

        def start():
            own = folder / "trials" / f"t{len(started)}"
            (own / ".nni").mkdir(parents=True)
            (own / ".nni" / "elsewhere").touch()
            (own / "parameter.cfg").write_text('{"lr": 1}')
            names = {"NNI_SYS_DIR": str(own), "NNI_EXP_ID": id, "NNI_TRIAL_SEQ_ID": "0"}
            names |= {"NNI_PLATFORM": "local", "NNI_TRIAL_JOB_ID": own.name}
            with (own / "stdout").open("w") as out, (own / "stderr").open("w") as err:
                how = {"env": os.environ | names, "stdout": out, "stderr": err}
                process = subprocess.Popen(["bash", "-c", config.trial_command], **how)
            process.own, process.note = own, own / ".nni" / "elsewhere"
            started.append(process)
            return process

        return start

    yield prepared
    for process in started:
        process.kill()


def test_the_machines_are_tried_before_the_start(machine, prepared, key, ssh, tmp_path, capsys):
    on, off = machine(environment={"LANG": "C"}).settings, machine("127.0.0.3")
    off.die()
    prepared([on, off.settings])
    assert re.search(
        r"machine \S+@127.0.0.3:\d+: .*refused; left out until", capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"machineList; allowed: machines that answer; machine .*"):
        prepared([off.settings])
    make_key(tmp_path / "other")
    make_program(tmp_path / "python3", "#!/bin/sh\n")
    wrong = {
        r"sshKeyFile is .*/other; allowed: a key with which .*Permission denied": {
            "sshKeyFile": str(tmp_path / "other")
        },
        r"sshKeyFile is .*/key; allowed: a key": {"sshPassphrase": None},
        r"sshKeyFile is .*; allowed: a key with which nobody_here": {"user": "nobody_here"},
        r"pythonPath is /bin/nowhere; .*(nni|python3)": {"pythonPath": "/bin/nowhere"},
        r"pythonPath is .*; allowed: the folder of a python3": {"pythonPath": str(tmp_path)},
        r"gpuIndices is 3; allowed: below 0": {"gpuIndices": [3]},
    }
    with pytest.raises(ValueError) as refusal:
        prepared([on | change for change in wrong.values()], trialGpuNumber=1)
    lines = str(refusal.value).split("; machine ")
    assert [*map(bool, map(re.search, wrong, lines))] == [True] * len(wrong), lines
    assert PASSPHRASE not in str(refusal.value)
    make_key(tmp_path / "new")
    changed = f"[127.0.0.2]:{on['port']} {(tmp_path / 'new.pub').read_text()}"
    forget = r"host key has changed; .*ssh-keygen -R '\[127.0.0.2\]:\d+'; ssh -p"
    unknown = r"host key is unknown; .* by: ssh -p \d+ \S+@"
    for known, expected in {"": unknown, changed: forget}.items():
        (ssh / "known_hosts").write_text(known)
        with pytest.raises(ValueError, match=expected):
            prepared([on])


def test_a_machine_that_cannot_keep_files_is_left_out(machine, prepared, capsys):
    full, free = machine(), machine("127.0.0.3")
    (full.folder / ".cache").write_text("no folder, as little as a full disk has room for one")
    prepared([full.settings, free.settings])
    assert re.search(r"@127.0.0.2:\d+: .*\.cache.*; left out", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["dash", "tcsh", "fish"])
def test_python_is_started_by_every_login_shell(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    (tmp_path / "python3").symlink_to(sys.executable)
    command = over_ssh.start_command({"pythonPath": f"~/{tmp_path.name}"}, "-IS")
    how = {"env": os.environ | {"HOME": str(tmp_path.parent)}, "text": True}
    text = "print(sys.executable)\n"
    said = subprocess.check_output([shell, "-c", command], input=f"{len(text)}\n{text}", **how)
    assert said == f"{tmp_path}/python3\n"


# A stand-in for ssh that asks as a machine with a password does, and for its key.
ASKS = r"""#!/bin/bash
ask() { "$SSH_ASKPASS" "$1"; }
[ "$(ask 'continue connecting (yes/no/[fingerprint])? ')" = no ] || exit 255
[ "$(ask "you@there's password: ")" = "it's opal" ] || exit 255
{ tr '\0' '\n' < /proc/$$/environ; tr '\0' '\n' < /proc/$$/cmdline; } | grep opal && exit 255
echo "a greeting of the login shell"
exec sh -c "${@: -1}"
"""


def test_a_password_is_only_told_to_who_asks_for_it(prepared, tmp_path, monkeypatch, capfd):
    make_program(tmp_path / "ssh", ASKS)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    there = {"host": "there", "user": "you", "password": "it's opal"}
    start = prepared([there], "! env | grep op''al")
    trial = start()
    assert trial.wait(60) == 0
    assert trial.note.read_text().endswith("there\n")
    files = [path for path in trial.own.parents[1].rglob("*") if path.is_file()]
    told = [path for path in files if "opal" in path.read_text(errors="ignore")]
    assert [(path.name, path.stat().st_mode & 0o777) for path in told] == [("askpass0", 0o700)]
    assert "opal" not in "".join(capfd.readouterr())


def test_what_ssh_knows_is_used(machine, prepared, ssh, tmp_path):
    make_key(tmp_path / "rsa", kind="rsa")
    first = machine(key=tmp_path / "rsa", MaxSessions=1)
    inner = machine("::1", key=tmp_path / "rsa", environment={"ENV": "x"})
    port = first.settings["port"]
    config = f"""
Host jump
HostName 127.0.0.2
Port {port}
Host inner
HostName ::1
ProxyCommand {ssh}/ssh -W [%h]:%p {first.settings["user"]}@jump
Host *
IdentityFile {tmp_path / "rsa"}
"""
    make_ssh(ssh, *config.splitlines())
    (first.folder / ".bashrc").write_text("echo a greeting\necho another >&2\n")
    names = ("jump", "inner")
    ports = (22, inner.settings["port"])
    settings = [
        {"host": name, "port": port, "user": first.settings["user"]}
        | {"pythonPath": first.settings["pythonPath"]}
        for name, port in zip(names, ports, strict=True)
    ]
    start = prepared(settings, "sleep 2")
    trials = [start(), start()]
    assert [trial.wait(60) for trial in trials] == [0, 0]
    assert {trial.note.read_text().split()[1] for trial in trials} == {"jump", "inner"}


def test_a_trial_runs_over_there_and_its_files_come_home(machine, prepared, tmp_path):
    there = machine()
    code = tmp_path / "code"
    (code / "data").mkdir()
    for name in ("data/big", "kept.txt", "left.out", ".git"):
        (code / name).write_text("x")
    (code / ".nniignore").write_text("data\n*.out\n")
    command = """API_KEY=xyz98765; ls -A; cat "$NNI_SYS_DIR/parameter.cfg"
    cd "$NNI_OUTPUT_DIR" && mkdir -p 'a b' && echo model > 'a b/model.pt'
    echo error >&2; printf 'ME000003{}\n' > .nni/metrics; ps axww -o args; sleep 1; exit 3"""
    start = prepared([there.settings], command)
    trial = start()
    wait_for(trial.note.read_text)
    began, host = trial.note.read_text().split()
    assert abs(float(began) / 1000 - time.time()) < 60 and host == "127.0.0.2"
    shown = wait_for((trial.own / "stdout").read_text)
    assert trial.wait(60) == 3
    output = (trial.own / "stdout").read_text()
    assert output.split("\n")[:3] == [".nniignore", "kept.txt", '{"lr": 1}COMMAND'], shown
    assert "xyz98765" not in output and PASSPHRASE not in output
    assert (trial.own / "stderr").read_text() == "error\n"
    assert (trial.own / ".nni" / "metrics").read_text() == "ME000003{}\n"
    assert (trial.own / "a b" / "model.pt").read_text() == "model\n"
    assert [path.name for path in trial.own.glob("*.sh")] == []
    assert there.left()[0].stat().st_mode & 0o777 == 0o700
    assert [*there.left()[0].glob("trials/*")] == []


# As nvidia-smi shows a GPU; the first one is busy.
GPU = "<gpu><gpu_util>0 %</gpu_util>{}</gpu>"
GPUS = GPU.format("<process_info></process_info>") + GPU.format("") * 2


@pytest.mark.parametrize(
    ("changes", "number", "seen"),
    [
        ({}, 1, ["1", "2"]),
        ({"useActiveGpu": True}, 1, ["0", "1", "2"]),
        ({"maxTrialNumberPerGpu": 2, "gpuIndices": [2]}, 1, ["2", "2"]),
        ({}, 2, ["1,2"]),
        ({}, 0, ["-1"]),
        ({}, None, ["all"]),
    ],
)
def test_trials_share_a_machines_gpus(machine, prepared, tmp_path, changes, number, seen):
    make_program(tmp_path / "nvidia-smi", f"#!/bin/sh\necho '<log>{GPUS}</log>'\n")
    there = machine().settings | changes
    there["pythonPath"] += f":{tmp_path}"
    gate = tmp_path / "gate"
    command = f"echo ${{CUDA_VISIBLE_DEVICES-all}}; until [ -e {gate} ]; do sleep 0.1; done"
    start = prepared([there], command, trialGpuNumber=number)
    trials = [start() for _ in range(4)]

    def begun():
        return sorted((t.own / "stdout").read_text().strip() for t in trials if t.note.read_text())

    wait_for(lambda: begun() == seen)
    time.sleep(1)
    assert begun() == seen
    gate.touch()
    assert [trial.wait(60) for trial in trials] == [0] * 4


@pytest.mark.parametrize("how", ["stopped", "killed", "cut", "dies"])
def test_nothing_goes_on_over_there(machine, prepared, how, tmp_path):
    there = machine()
    command = "cd $NNI_OUTPUT_DIR; touch begun; (setsid sleep 1000 &); trap 'touch late' TERM; "
    start = prepared([there.settings], f"{command}sleep 1000 & wait; sleep 1000")
    trial = start()
    wait_for(lambda: len(there.processes("sleep")) == 2)
    if how == "stopped":
        trial.terminate()
    elif how == "killed":
        trial.kill()
    elif how == "cut":  # as by a network: what runs there goes on
        there.signal(signal.SIGSTOP, "sshd")
    else:
        there.die()
    trial.wait(60)  # 16 s after a cut, on a machine that is not busy
    if how == "cut":
        wait_for(lambda: not there.processes("sleep"))
        there.signal(signal.SIGCONT, "sshd")
    if how == "stopped":
        assert (trial.own / "begun").exists() and (trial.own / "late").exists()
    elif how != "killed":
        words = "it does not answer" if how == "cut" else "closed|reset|Broken"
        assert re.match(
            rf"lost machine \S+@127.0.0.2:\d+ is lost: .*({words})", trial.note.read_text()
        )
    wait_for(lambda: not there.processes("sleep"))
    if how != "dies":
        wait_for(lambda: not [*there.folder.glob(".cache/*/*/trials/*")])


def notices(search):
    """Return what NNI's manager has to say to whoever watches the search."""
    path = search.home / "nni-experiments" / search.id / "log" / "notices.log"
    return path.read_text() if path.exists() else ""


def values(search, trial):
    """Return what NNI has stored of a trial's results, {type: [value, ...]}."""
    found = {"PERIODICAL": [], "FINAL": []}
    for metric in search.get(f"metric-data/{trial['trialJobId']}"):
        found[metric["type"]].append(metric_value(metric))
    return found


def test_a_search_goes_on_while_machines_come_and_go(experiment, machine, tmp_path):
    first, second, third = machines = [machine(f"127.0.0.{number}") for number in (2, 3, 4)]
    third.die()
    gate = tmp_path / "gate"  # until it is there no trial ends
    command = f"{LIGHT_TRIAL} 1; echo kept > $NNI_OUTPUT_DIR/kept; "
    command += f"until [ -e {gate} ]; do sleep 0.2; done"
    space = {key: SPACE[key] for key in SPACE if key != "epochs"}
    service = {"platform": "remote", "machineList": [each.settings for each in machines]}
    changes = {"trainingService": service, "searchSpace": space, "trialCommand": command}
    changes |= {"trialConcurrency": 3, "maxTrialNumber": 5, "trialGpuNumber": None}
    changes |= {"tuner": {"name": "Random"}, "nniManagerIp": "192.0.2.9"}
    demo = experiment("configs/remote.yml", SEARCH, **changes)
    assert "127.0.0.4" in demo.said and "left out until it answers" in demo.said

    def on(machine):
        """Return the trials that run on a machine and have a result."""
        return [
            trial
            for trial in demo.get("trial-jobs")
            if trial["status"] == "RUNNING"
            and f"//{machine.settings['host']}" in trial.get("logPath", "")
            and values(demo, trial)["FINAL"]
        ]

    (lost,) = wait_for(lambda: on(first) and on(second) and on(first))
    assert [trial["status"] for trial in demo.get("trial-jobs")].count("WAITING") == 1
    first.die()
    third.start()
    name = f"trial {lost['sequenceId']} ({lost['trialJobId']}) is run again (1): machine "
    wait_for(lambda: name in notices(demo))
    wait_for(lambda: re.search("127.0.0.4:.* is back, and used again", notices(demo)))
    wait_for(lambda: on(third) and on(second))
    first.start()
    wait_for(lambda: len(on(first)) == 1)
    (manager,) = processes_at(demo.home, MANAGER)
    manager.kill()
    wait_for(lambda: not processes_at(demo.home, MANAGER))
    demo.resume()
    gate.touch()
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    assert sorted(trial["sequenceId"] for trial in trials) == [0, 1, 2, 3, 4]
    again = [trial for trial in trials if trial["trialJobId"] == lost["trialJobId"]]
    assert [parameters(trial) for trial in again] == [parameters(lost)]
    for trial in trials:
        assert {kind: len(each) for kind, each in values(demo, trial).items()} == {
            "PERIODICAL": 2,
            "FINAL": 1,
        }
        assert repr(parameters(trial)["lr"]) in demo.trial_file(trial, "stdout")
        assert demo.trial_file(trial, "kept") == "kept\n"
    assert demo.stop() == []
    assert [machine.left() for machine in machines] == [[]] * 3
    assert not any(machine.processes("python") for machine in machines)
