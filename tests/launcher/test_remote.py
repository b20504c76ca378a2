"""Searches over SSH: machines on loopback addresses are tried, lost and used again."""

import hmac
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import LIGHT_TRIAL, ROOT, SPACE, UPGRADE, ask, nobody, outside_address, writable
from experiment import MANAGER, SEARCH, free_port, metric_value, parameters, processes_at
from machines import PASSPHRASE, SSHD, Machine, make_key
from nni.experiment.config.training_services.remote import RemoteConfig, RemoteMachineConfig
from waiting import wait_for

from nnisearch.before.machines import check_machines
from nnisearch.results.database import Trials

GPU = (  # as nvidia-smi shows one that is free
    "<gpu><processes></processes><product_name>A</product_name>"
    "<utilization><gpu_util>0 %</gpu_util><memory_util>0 %</memory_util></utilization>"
    "<fb_memory_usage><total>1 MiB</total><used>0 MiB</used><free>1 MiB</free>"
    "</fb_memory_usage></gpu>"
)
RUNNER = ROOT / "nnisearch" / "manager" / "runner.py"
# From Debian 13. NNI's Node has OpenSSL 1.1.1, which has no providers.
OPENSSL_CNF = """
openssl_conf = openssl_init
[openssl_init]
providers = provider_sect
[provider_sect]
default = default_sect
[default_sect]
"""
pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd, Debian's openssh-server")


@pytest.fixture
def machines(tmp_path, environment):
    """Three machines with what newer systems bring. The third is off; the first has EPOCHS 1000."""
    (tmp_path / "openssl.cnf").write_text(OPENSSL_CNF)
    environment["OPENSSL_CONF"] = str(tmp_path / "openssl.cnf")
    key = tmp_path / "key"
    make_key(key, PASSPHRASE)
    # As Python has it since 3.14: no event loop unless one is set.
    (tmp_path / "sitecustomize.py").write_text("import asyncio; asyncio.set_event_loop(None)")
    given = {"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"}
    machines = [
        Machine(address, tmp_path / address, key, given | {"HOME": tmp_path / address, "EPOCHS": n})
        for address, n in (("127.0.0.2", 1000), ("127.0.0.3", 1), ("127.0.0.4", 1))
    ]
    machines[2].die()
    yield machines
    for machine in machines:
        machine.die()


@pytest.fixture
def search(experiment, machines):
    """Start a search of configs/remote.yml on the machines; afterwards remove its files."""
    searches = []

    def search(**changes):
        # NNI takes one training service with two machines, or two training services.
        changes["trainingService"] = [
            {"platform": "remote", "reuseMode": True, "machineList": [m.settings for m in some]}
            for some in (machines[:1], machines[1:])
        ]
        changes |= {"nniManagerIp": "127.0.0.1", "tuner": {"name": "Random"}}
        how = [*SEARCH, "--no-rehearsal"]
        searches.append(experiment("configs/remote.yml", how, **changes))
        return searches[-1]

    yield search
    for one in searches:
        shutil.rmtree(remote_files(one).parents[1], ignore_errors=True)


def remote_files(search):
    """Return NNI's folder on a machine: it is always below /tmp, and NNI leaves it there."""
    return Path(f"/tmp/nni-{search.id}", "nni-experiments", search.id)


def notices(search):
    """Return what NNI's manager has to say to whoever watches the search."""
    path = search.home / "nni-experiments" / search.id / "log" / "notices.log"
    return path.read_text() if path.exists() else ""


def machine_of(trial):
    """Return the address of the machine that a trial ran on, or None before it runs."""
    return trial["logPath"].split("/")[2].split(":")[0] if "logPath" in trial else None


def values(search, trial):
    """Return what NNI has stored of a trial's results, {type: [value, ...]}."""
    found = {"PERIODICAL": [], "FINAL": []}
    for metric in search.get(f"metric-data/{trial['trialJobId']}"):
        found[metric["type"]].append(metric_value(metric))
    return found


def test_the_machines_are_tried_before_the_start(machines, tmp_path):
    make_key(tmp_path / "other")
    on, off = machines[1].settings, machines[2].settings

    def check(*machines, address="127.0.0.1"):
        listed = [RemoteMachineConfig(**machine) for machine in machines]
        service = RemoteConfig(machine_list=listed, reuse_mode=True)
        config = SimpleNamespace(nni_manager_ip=address, training_service=service)
        return check_machines(config, free_port)

    (line,) = check(on, off)
    assert "127.0.0.4" in line and line.endswith("left out until it answers")
    with pytest.raises(ValueError, match=r"allowed: machines that answer; machine .*ECONNREFUSED"):
        check(off)
    wrong = [{"sshKeyFile": str(tmp_path / "other")}, {"sshPassphrase": None}]
    wrong += [{"pythonPath": "/nowhere"}, {"pythonPath": str(tmp_path)}]
    (tmp_path / "python3").write_text("#!/bin/sh\n")
    (tmp_path / "python3").chmod(0o755)
    with pytest.raises(ValueError) as refusal:
        check(on, *(on | change for change in wrong))
    expected = ["other; allowed: an Ed", "no passphrase given", "python.*nowhere", "not answer"]
    lines = str(refusal.value).split("; machine ")
    assert [bool(re.search(*pair)) for pair in zip(expected, lines, strict=True)] == [True] * 4
    with pytest.raises(ValueError, match=r"nniManagerIp is 255\S+; allowed: an address that"):
        check(on, address="255.255.255.255")


def last_states(search):
    """Return {ID: state} of the trials, as a manager that has been killed has noted them."""
    path = search.home / "nni-experiments" / search.id / "db" / "nni.sqlite"
    trials = Trials(path)
    trials.update()
    return {id: trial.status for id, trial in trials.by_id.items()}


def test_a_search_goes_on_while_machines_come_and_go(search, machines, tmp_path):
    first, second, third = machines
    before = set(Path("/tmp").iterdir())
    gate = tmp_path / "gate"  # until it is there no trial ends; one on the first machine never does
    command = f"API_KEY=xyz98765; echo on GPU $CUDA_VISIBLE_DEVICES; {LIGHT_TRIAL} $EPOCHS"
    command += f" && until [ -e {gate} ]; do sleep 0.2; done"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '<log>{GPU * 2}</log>'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for machine in machines:
        machine.settings["gpuIndices"] = [1]
        machine.settings["pythonPath"] += f":{tmp_path}"
    changes = {"trialCommand": command, "trialConcurrency": 3, "trialGpuNumber": 1}
    changes["searchSpace"] = {key: SPACE[key] for key in SPACE if key != "epochs"}
    demo = search(maxTrialNumber=5, **changes)
    assert "127.0.0.4" in demo.said and "left out until it answers" in demo.said
    # The port that the machines report to is open to them and to nobody else.
    assert ask(demo.port + 1, path="/") == 426  # to this machine's user, who is one of them here
    assert ask(demo.port + 1, "Origin: http://example.com", path="/") == 403
    assert ask(demo.port + 1, path="/", address=outside_address(), user=nobody()) is None
    assert ask(demo.port + 1, path="/", user=nobody()) is None
    # The folder of all that NNI writes on a machine.
    folder = remote_files(demo).parents[1]
    settings = wait_for(lambda: list(folder.rglob("settings.json")))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert writable(folder) == []
    # Who has read the runner's ID in ps, on a machine that may report, may not report for it.
    assert ask(demo.port + 1, *UPGRADE, path="/") == 400
    port, _, secret = json.loads(settings[0].read_text())["nniManagerPort"].partition("/")
    assert int(port) == demo.port + 1
    proof = hmac.new(secret.encode(), b"runner 7", "sha256").hexdigest()
    assert ask(demo.port + 1, *UPGRADE, path=f"/8/{proof}") == 400
    assert ask(demo.port + 1, *UPGRADE, path=f"/7/{proof}") == 101

    def have_reported(kind):
        return {machine_of(t) for t in demo.get("trial-jobs") if values(demo, t)[kind]}

    wait_for(lambda: have_reported("PERIODICAL") == {"127.0.0.2", "127.0.0.3"})
    ps = ["ps", "axww", "-o", "args"]
    shown = subprocess.run(ps, capture_output=True, text=True).stdout
    assert secret not in shown
    assert PASSPHRASE not in shown
    assert "xyz98765" not in shown
    assert remote_files(demo).name in shown  # the shell of a trial

    # The first machine hangs, and the third one comes.
    (hung,) = [trial for trial in demo.get("trial-jobs") if machine_of(trial) == "127.0.0.2"]
    first.signal(signal.SIGSTOP)
    third.start()
    wait_for(lambda: re.search("127.0.0.4:.* is back, and used again", notices(demo)))
    name = f"trial {hung['sequenceId']} ({hung['trialJobId']}) is run again"
    wait_for(lambda: name in notices(demo))
    first.die()
    assert values(demo, hung) == {"PERIODICAL": [], "FINAL": []}
    wait_for(lambda: have_reported("FINAL") == {"127.0.0.3", "127.0.0.4"})
    assert {t["status"] for t in demo.get("trial-jobs")} == {"RUNNING", "WAITING"}
    (manager,) = processes_at(demo.home, MANAGER)
    manager.kill()
    # The runners and their trials end, and so nothing runs twice.
    wait_for(lambda: not any(machine.processes("trial") for machine in (second, third)))
    # As a runner leaves a trial's folder that ends while it unpacks the code there.
    folders = {path.parent.name: path.parent for path in remote_files(demo).glob("trials/*/code")}
    (under_way, *_) = (id for id, state in last_states(demo).items() if state == "RUNNING")
    shutil.rmtree(folders[under_way] / "code")
    (folders[under_way] / "trial_prepared").unlink()
    gate.touch()
    demo.resume()
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    assert sorted(trial["sequenceId"] for trial in trials) == [0, 1, 2, 3, 4]
    assert {machine_of(trial) for trial in trials} <= {"127.0.0.3", "127.0.0.4"}
    again = [trial for trial in trials if trial["trialJobId"] == hung["trialJobId"]]
    assert [parameters(trial) for trial in again] == [parameters(hung)]
    outputs = remote_files(demo).glob("envs/*/trialrunner_stdout")  # one for each runner
    printed = "".join(output.read_text() for output in outputs)
    assert {line for line in printed.splitlines() if line.startswith("on GPU")} == {"on GPU 1"}
    for trial in trials:
        found = values(demo, trial)
        assert len(found["PERIODICAL"]) == 2  # each once
        (result,) = found["FINAL"]
        assert f"Acc: {result:.3f}%" in printed
        assert repr(parameters(trial)["lr"]) in printed

    second.die()
    third.die()
    wait_for(lambda: "no machine is left" in notices(demo))
    first.start()
    wait_for(lambda: re.search("127.0.0.2:.* is back, and used again", notices(demo)))
    assert demo.stop() == []
    left = {path.name for path in set(Path("/tmp").iterdir()) - before if "nni" in path.name}
    # Other tests' searches, which run beside this one, have such a folder each, too.
    assert {name for name in left if not re.fullmatch(r"nni-\w{8}", name)} == set()
    # The folder's name is known once a search has started; a resumed one must not fall for that.
    shutil.rmtree(folder)
    folder.mkdir(0o700)
    os.chown(folder, nobody(), nobody())
    demo.resume()
    wait_for(lambda: f"{folder} is not a private folder of this user" in notices(demo))
    assert list(folder.iterdir()) == []


# A manager that lets a runner start a trial, and is silent afterwards.
MANAGERS_END = """
import hmac, json, os, threading
from websockets.sync.server import serve

def prove(channel, request, response):
    nonce = request.path.split("/")[1]
    proof = hmac.new(b"secret", f"manager {nonce}".encode(), "sha256").hexdigest()
    response.headers["X-Proof"] = proof

def receive(channel):
    channel.recv()
    given = json.dumps({"trialId": "abc", "sequenceId": 0, "parameter": {"value": "{}"}})
    channel.send(f"TR{len(given):014}{given}")
    for message in channel:
        print(message, flush=True)

threading.Timer(240, os._exit, [1]).start()  # if no runner comes
server = serve(receive, "127.0.0.1", 0, process_response=prove)
print(server.socket.getsockname()[1], flush=True)
server.serve_forever()
"""


def test_a_runner_whose_manager_is_silent_ends_its_trial_and_itself(tmp_path, environment):
    folder = tmp_path / "envs" / "runner"
    folder.mkdir(parents=True)
    tarfile.open(tmp_path / "envs" / "nni-code.tar.gz", "w:gz").close()
    command = """printf "one \\377\\nNNISDK_MEb'{}'\\n"; sleep 1000"""
    with subprocess.Popen(
        [sys.executable, "-c", MANAGERS_END], stdout=subprocess.PIPE, text=True
    ) as manager:
        settings = {"command": command, "nniManagerIP": "127.0.0.1", "logCollection": "none"}
        port = int(manager.stdout.readline())
        settings |= {"nniManagerPort": f"{port}/secret", "commandChannel": "web"}
        settings |= {"nniManagerVersion": "", "experimentId": "id", "platform": "remote"}
        settings |= {"enableGpuCollector": False}
        (folder / "settings.json").write_text(json.dumps(settings))
        runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER.read_text()], cwd=folder, env=environment
        )
        try:
            assert any("NNISDK_MEb" in line for line in manager.stdout)
            trial = psutil.Process(runner.pid).children(recursive=True)
            manager.send_signal(signal.SIGSTOP)
            assert runner.wait(240) == 1
            assert psutil.wait_procs(trial, timeout=60)[1] == []
        finally:
            manager.kill()
            runner.kill()
