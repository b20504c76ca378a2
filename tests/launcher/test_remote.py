"""A search over SSH: two machines on loopback addresses, and what happens when one of them dies."""

import contextlib
import getpass
import hmac
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ENDLESS, LIGHT_TRIAL, ROOT, SPACE, ask, nobody, outside_address
from experiment import MANAGER, metric_value, parameters, processes_at

from nnisearch.shared.results import Trials

# A web socket's first request.
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
UPGRADE.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
PASSPHRASE = "correct horse"
REMOTE = yaml.safe_load((ROOT / "configs" / "remote.yml").read_text())["trainingService"]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
COMMAND = "python3 train.py --dataset synthetic --device cpu --report-every 50"
# As Debian has it since 13. NNI's Node has OpenSSL 1.1.1, which knows no providers.
OPENSSL_CNF = """
openssl_conf = openssl_init
[openssl_init]
providers = provider_sect
[provider_sect]
default = default_sect
[default_sect]
"""
pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd, Debian's openssh-server")


def make_key(path, passphrase=""):
    # One round of what makes guessing a passphrase slow: NNI's Node stands still meanwhile.
    rounds = ["-a", "1"]
    command = ["ssh-keygen", "-qt", "ed25519", *rounds, "-N", passphrase, "-f", path]
    subprocess.run(command, check=True)


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
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection((address, self.port)):
                break
            time.sleep(0.1)
        self.settings = {
            "host": address,
            "port": self.port,
            "user": getpass.getuser(),
            "sshKeyFile": str(key),
            "sshPassphrase": PASSPHRASE,
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
    """Two machines, with what newer systems bring, and configs/remote.yml's settings for them."""
    (tmp_path / "openssl.cnf").write_text(OPENSSL_CNF)
    environment["OPENSSL_CONF"] = str(tmp_path / "openssl.cnf")
    key = tmp_path / "key"
    make_key(key, PASSPHRASE)
    # As Python has it since 3.14: no event loop unless one is set.
    (tmp_path / "sitecustomize.py").write_text("import asyncio; asyncio.set_event_loop(None)")
    given = {
        "OMP_NUM_THREADS": environment["OMP_NUM_THREADS"],
        "PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}",
    }
    machines = [
        Machine(address, tmp_path / address, key, given | {"HOME": tmp_path / address, "EPOCHS": n})
        for address, n in (("127.0.0.2", 1000), ("127.0.0.3", 1))
    ]
    yield machines
    for machine in machines:
        machine.die()


@pytest.fixture
def search(experiment, machines):
    """Start a search of configs/remote.yml on the two machines; afterwards remove its files."""
    searches = []

    def search(trials, **changes):
        settings = {
            "trialCommand": LIGHT_TRIAL,
            "trialGpuNumber": 0,
            "maxTrialNumber": trials,
            "searchSpace": SPACE,
            "nniManagerIp": "127.0.0.1",
            "trainingService": REMOTE | {"machineList": [one.settings for one in machines]},
        }
        one = experiment("configs/remote.yml", **settings | changes)
        searches.append(one)
        return one

    yield search
    for one in searches:
        shutil.rmtree(remote_files(one).parents[1], ignore_errors=True)


def remote_files(search):
    """Return NNI's folder on a machine: it is always below /tmp, and NNI leaves it there."""
    return Path(f"/tmp/nni-{search.id}", "nni-experiments", search.id)


def writable(folder):
    """Return what below the folder everybody may write."""
    command = ["find", folder, "-not", "-type", "l", "-perm", "/o+w"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def machine_of(trial):
    """Return the address of the machine that a trial ran on, or None before it runs."""
    return trial["logPath"].split("/")[2].split(":")[0] if "logPath" in trial else None


def test_a_search_on_two_machines(search, machines):
    before = set(Path("/tmp").iterdir())
    # NNI takes one training service with two machines, or two training services.
    services = [REMOTE | {"machineList": [one.settings]} for one in machines]
    demo = search(4, trialCommand=COMMAND, trainingService=services)
    # The port that the machines report to is open to them and to nobody else.
    assert ask(demo.port + 1, path="/") == 426  # to this machine's user, who is one of them here
    assert ask(demo.port + 1, "Origin: http://example.com", path="/") == 403
    assert ask(demo.port + 1, path="/", address=outside_address(), user=nobody()) is None
    assert ask(demo.port + 1, path="/", user=nobody()) is None
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
    left = {path.name for path in set(Path("/tmp").iterdir()) - before if "nni" in path.name}
    # Other tests' searches, which run beside this one, have such a folder each, too.
    assert {name for name in left if not re.fullmatch(r"nni-\w{8}", name)} == set()


def test_nobody_else_writes_on_a_machine_or_reports_for_it(search, machines):
    demo = search(2, searchSpace=ENDLESS, trialCommand=f"API_KEY=xyz98765; {LIGHT_TRIAL}")
    folder = remote_files(demo).parents[1]
    while not (settings := list(folder.rglob("settings.json"))):
        time.sleep(0.1)
    # The folder of all that NNI writes on a machine.
    assert folder.stat().st_mode & 0o777 == 0o700
    assert writable(folder) == []
    # Who has read the runner's ID in ps, on a machine that may report, may not report for it.
    assert ask(demo.port + 1, *UPGRADE, path="/") == 400
    port, _, secret = json.loads(settings[0].read_text())["nniManagerPort"].partition("/")
    assert int(port) == demo.port + 1
    proof = hmac.new(secret.encode(), b"runner 7", "sha256").hexdigest()
    assert ask(demo.port + 1, *UPGRADE, path=f"/8/{proof}") == 400
    assert ask(demo.port + 1, *UPGRADE, path=f"/7/{proof}") == 101
    demo.wait_for(lambda trials: [t["status"] for t in trials] == ["RUNNING"] * 2, 120)
    shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert secret not in shown
    assert PASSPHRASE not in shown
    assert "light_trial.py" in shown
    assert "xyz98765" not in shown
    assert demo.stop() == []


def test_a_folder_that_another_user_has_made_on_a_machine_is_not_used(search):
    """Its name is known once a search has started; a resumed one must not fall for that."""
    demo = search(1, searchSpace=ENDLESS)
    folder = remote_files(demo).parents[1]
    while not folder.exists():
        time.sleep(0.1)
    demo.stop()
    shutil.rmtree(folder)
    folder.mkdir(0o700)
    os.chown(folder, nobody(), nobody())
    with contextlib.suppress(RuntimeError):  # by chance before or after search.py has seen it run
        demo.resume()
    log = demo.home / "nni-experiments" / demo.id / "log" / "nnictl_stderr.log"
    while f"{folder} is not a folder of this user's alone" not in log.read_text():
        time.sleep(0.1)
    assert list(folder.iterdir()) == []


def is_in_the_middle(trials):
    """Return whether two trials of a search have ended, and another runs."""
    states = [trial["status"] for trial in trials]
    return states.count("SUCCEEDED") >= 2 and "RUNNING" in states


def last_states(search):
    """Return {ID: state} of the trials, as a manager that has been killed has noted them."""
    path = search.home / "nni-experiments" / search.id / "db" / "nni.sqlite"
    trials = Trials(path)
    trials.update()
    return {id: trial.status for id, trial in trials.known.items()}


def test_after_its_manager_is_killed_a_search_on_machines_is_exact(search, machines):
    demo = search(5, searchSpace=SPACE | {"epochs": {"_type": "choice", "_value": [10]}})
    demo.wait_for(is_in_the_middle, 240)
    (manager,) = processes_at(demo.home, MANAGER)
    manager.kill()
    # As a runner leaves a trial's folder that ends while it unpacks the code there.
    folders = {path.parent.name: path.parent for path in remote_files(demo).glob("trials/*/code")}
    (under_way, *_) = (id for id, state in last_states(demo).items() if state == "RUNNING")
    shutil.rmtree(folders[under_way] / "code")
    (folders[under_way] / "trial_prepared").unlink()
    demo.resume()
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    assert len({trial["sequenceId"] for trial in trials}) == 5
    for trial in trials:
        metrics = demo.get(f"metric-data/{trial['trialJobId']}")
        assert [metric["type"] for metric in metrics].count("FINAL") == 1
        numbers = [metric["sequence"] for metric in metrics if metric["type"] == "PERIODICAL"]
        # NNI stores what comes at once in any order, and numbers it.
        assert sorted(numbers) == list(range(len(numbers)))


def test_when_a_machine_dies_the_other_goes_on_and_the_search_ends(search, machines):
    """NNI never notices: what ran on the dead machine stays RUNNING until maxTrialDuration."""
    dead, alive = (machine.settings["host"] for machine in machines)
    # A trial on the first machine cannot end by itself.
    changes = {"trialCommand": f"{LIGHT_TRIAL} $EPOCHS", "maxTrialDuration": "90s"}
    changes["searchSpace"] = {key: SPACE[key] for key in SPACE if key != "epochs"}
    demo = search(3, **changes)
    both = {dead, alive}
    demo.wait_for(lambda trials: {machine_of(t) for t in trials if reported(demo, t)} == both, 180)
    machines[0].die()
    (lost,) = [trial for trial in demo.get("trial-jobs") if machine_of(trial) == dead]
    assert lost["status"] == "RUNNING"

    trials = demo.wait(180)
    assert len(trials) == 3
    for trial in trials:
        is_lost = trial["trialJobId"] == lost["trialJobId"]
        assert trial["status"] == ("EARLY_STOPPED" if is_lost else "SUCCEEDED")
    demo.nnictl("experiment", "export", demo.id, "-t", "json", "-f", demo.home / "out.json")
    exported = json.loads((demo.home / "out.json").read_text())
    others = {trial["trialJobId"] for trial in trials} - {lost["trialJobId"]}
    assert others <= {trial["trialJobId"] for trial in exported}
    assert demo.stop() == []


def reported(search, trial):
    return search.get(f"metric-data/{trial['trialJobId']}")
