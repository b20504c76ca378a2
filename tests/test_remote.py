"""A search over SSH: two machines on loopback addresses, and what happens when one of them dies."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, SPACE
from experiment import metric_value, parameters

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd, Debian's openssh-server")


def make_key(path):
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", path], check=True)


class Machine:
    """A machine on a loopback address of its own: an sshd and what it starts."""

    def __init__(self, address, folder, key, environment):
        folder.mkdir()
        subprocess.run(
            ["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", folder / "host"], check=True
        )
        with socket.socket() as free:
            free.bind((address, 0))
            self.port = free.getsockname()[1]
        settings = {
            "ListenAddress": address,
            "Port": self.port,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": key.with_suffix(".pub"),
            "StrictModes": "no",  # pytest's folders are of no mode that it accepts for a key
            "PidFile": "none",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "Subsystem": "sftp internal-sftp",
            "SetEnv": " ".join(f"{name}={value}" for name, value in environment.items()),
        }
        (folder / "sshd").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # what Debian's service makes at its start
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd"])
        self.settings = {
            "host": address,
            "port": self.port,
            "user": getpass.getuser(),
            "sshKeyFile": str(key),
            "pythonPath": str(Path(sys.executable).parent),
        }

    def die(self):
        """Kill the sshd and all that it has started, as a loss of power would."""
        with contextlib.suppress(psutil.Error):
            this = psutil.Process(self.process.pid)
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def machines(tmp_path, environment):
    """Two machines, and configs/remote.yml's settings for them."""
    key = tmp_path / "key"
    make_key(key)
    given = {name: environment[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    machines = [
        Machine(address, tmp_path / address, key, given | {"HOME": tmp_path / address})
        for address in ("127.0.0.2", "127.0.0.3")
    ]
    yield machines
    for machine in machines:
        machine.die()


@pytest.fixture
def search(experiment, machines):
    """Start a search of configs/remote.yml on the two machines; afterwards remove its files."""
    searches = []

    def search(trials):
        service = yaml.safe_load((ROOT / "configs" / "remote.yml").read_text())["trainingService"]
        one = experiment(
            "configs/remote.yml",
            trialCommand="python3 train.py --dataset synthetic --device cpu --report-every 50",
            trialGpuNumber=0,
            maxTrialNumber=trials,
            searchSpace=SPACE,
            nniManagerIp="127.0.0.1",
            trainingService=service | {"machineList": [machine.settings for machine in machines]},
        )
        searches.append(one)
        return one

    yield search
    for one in searches:
        shutil.rmtree(remote_files(one), ignore_errors=True)


def remote_files(search):
    """Return NNI's folder on a machine: it is always below /tmp, and NNI leaves it there."""
    return Path("/tmp/nni-experiments", search.id)


def machine_of(trial):
    """Return the address of the machine that a trial ran on, or None before it runs."""
    return trial["logPath"].split("/")[2].split(":")[0] if "logPath" in trial else None


def test_a_search_on_two_machines(search, machines):
    before = set(Path("/tmp").iterdir())
    demo = search(trials=4)
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 4
    assert {machine_of(trial) for trial in trials} == {m.settings["host"] for m in machines}
    outputs = remote_files(demo).glob("envs/*/trialrunner_stdout")  # one for each machine
    printed = "".join(output.read_text() for output in outputs)
    assert printed.count("Acc: ") == 4
    for trial in trials:
        given = parameters(trial)
        assert all(repr(value) in printed for value in (given["lr"], given["momentum"]))
        metrics = demo.get(f"metric-data/{trial['trialJobId']}")
        values = [(m["type"], metric_value(m)) for m in metrics]
        steps = -(-10_000 // given["batch_size"])
        windows = given["epochs"] * (steps // min(50, steps))
        assert [kind for kind, _ in values] == ["PERIODICAL"] * windows + ["FINAL"]
        assert f"Acc: {values[-1][1]:.3f}% (" in printed
        assert all(f"loss: {loss:.3f}" in printed for _, loss in values[:-1])
    assert demo.stop() == []
    left = {path for path in set(Path("/tmp").iterdir()) - before if "nni" in path.name}
    assert left <= {remote_files(demo).parent}


def test_when_a_machine_dies_the_other_goes_on(search, machines):
    """NNI never notices: what ran on the dead machine stays RUNNING, as the README says."""
    demo = search(trials=3)
    dead, alive = (machine.settings["host"] for machine in machines)
    both = {dead, alive}
    demo.wait_for(lambda trials: {machine_of(t) for t in trials if reported(demo, t)} == both, 180)
    machines[0].die()
    lost = [trial for trial in demo.get("trial-jobs") if machine_of(trial) == dead]
    lost = [trial["trialJobId"] for trial in lost if trial["status"] == "RUNNING"]

    def others_ended(trials):
        others = [t["status"] for t in trials if t["trialJobId"] not in lost]
        return len(trials) == 3 and set(others) == {"SUCCEEDED"}

    trials = demo.wait_for(others_ended, 180)
    assert demo.get("check-status")["status"] == ("NO_MORE_TRIAL" if lost else "DONE")
    assert {t["status"] for t in trials if t["trialJobId"] in lost} <= {"RUNNING"}
    demo.nnictl("experiment", "export", demo.id, "-t", "json", "-f", demo.home / "out.json")
    assert len(json.loads((demo.home / "out.json").read_text())) == 3 - len(lost)
    assert demo.stop() == []


def reported(search, trial):
    return search.get(f"metric-data/{trial['trialJobId']}")
