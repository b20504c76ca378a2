"""Experiments of NNI with a HOME and a port of their own, for bench/ and tests/."""

import collections
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import yaml
from waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
# Three ways to start an experiment: search.py, search.py without its checks, and nnictl.
SEARCH = [ROOT / "search.py"]
UNCHECKED = [ROOT / "tests" / "support" / "unchecked.py", "--keep-going"]
NNICTL = [
    "-c",
    "import sys; from nni.experiment import launcher;"
    "from nni.tools.nnictl.nnictl import parse_args;"
    "launcher._check_rest_server.__defaults__ = (60, None);"  # not 3 seconds, for a busy machine
    "sys.argv[:] = ['nnictl', 'create', '-c', *sys.argv[1:4]]; parse_args()",
]


KEPT = {".experiment", ".experiment.lock", ".nnisearch.lock"}  # NNI's own, and the lock of starts
MANAGER = "nni_node/main.js"  # in the manager's command, and in no other


def processes_at(home, part=""):
    """Return the processes with this HOME whose command contains part."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile, or is another user's
            is_there = process.environ().get("HOME") == str(home)
            if is_there and part in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_at(home):
    """Kill the processes with this HOME and return them."""
    found = processes_at(home)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            process.kill()
    return found


def assert_nothing_is_left(home):
    """Check that starts have left no process, no folder, and no entry in NNI's list."""
    psutil.wait_procs(processes_at(home), timeout=120)
    assert processes_at(home) == []
    wait_for(lambda: {path.name for path in home.glob("nni-experiments/*")} <= KEPT)
    assert json.loads((home / "nni-experiments" / ".experiment").read_text() or "{}") == {}


def free_port():
    """Return a free port.

    Linux gives higher ports to outgoing connections, so none of these takes it before NNI does.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def parameters(trial):
    """Return the hyperparameters of a trial as NNI lists them."""
    (given,) = trial["hyperParameters"]
    return json.loads(given)["parameters"]


def printed_parameters(log):
    """Return the hyperparameters that a trial has printed in its log."""
    return json.loads(log.split("Hyperparameters: ")[1].splitlines()[0])


def metric_value(metric):
    """Return the number in a metric as NNI lists it, JSON in JSON."""
    return json.loads(json.loads(metric["data"]))


def accuracy(trial):
    """Return the final result of a trial as NNI lists it."""
    return metric_value(trial["finalMetricData"][0])


class Experiment:
    """An experiment, by a changed configuration, that search.py starts in a HOME of its own."""

    def __init__(self, path, home, environment, start=SEARCH, **changes):
        self.home = home
        # NNI keeps nvidia-smi's answers in TMPDIR. The trials run by this Python.
        folders = {"HOME": str(home), "TMPDIR": str(home)}
        paths = f"{home}:{Path(sys.executable).parent}:{environment['PATH']}"
        python_path = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        self.environment = environment | folders | {"PATH": paths, "PYTHONPATH": python_path}
        config = yaml.safe_load(path.read_text()) | {"trialCodeDirectory": str(ROOT)} | changes
        if "codeDirectory" in config["tuner"]:
            config["tuner"]["codeDirectory"] = str(ROOT)
        config.pop("searchSpaceFile", None)  # every test brings its own space
        (home / "config.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        command = [sys.executable, *start, home / "config.yml", "-p", self.port, "--detach"]
        self.said = self.run(*command)
        self.id = self.get("experiment")["id"]

    def run(self, *command):
        """Run a command in the experiment's environment and return what it printed."""
        result = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if result.returncode:
            raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stdout}")
        return result.stdout

    def nnictl(self, *args):
        """Run nnictl and return what it printed."""
        return self.run(Path(sys.executable).parent / "nnictl", *args)

    def resume(self):
        """Go on with the experiment after its manager has ended."""
        self.run(sys.executable, *UNCHECKED, "--resume", self.id, "-p", self.port, "--detach")

    def get(self, what):
        """Return the answer of NNI's REST server."""
        return json.loads(self.request("GET", what))

    def request(self, method, what, body=None):
        """Send a request to NNI's REST server, with body as JSON; return the answer."""
        url = f"http://127.0.0.1:{self.port}/api/v1/nni/{what}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        given = {"data": body and json.dumps(body).encode(), "method": method}
        request = urllib.request.Request(url, headers={"Content-Type": "application/json"}, **given)
        with opener.open(request, timeout=30) as answer:
            return answer.read()

    def wait(self, seconds):
        """Wait until all trials have ended and return them."""
        self.wait_until(lambda: self.get("check-status")["status"] == "DONE", seconds)
        return self.get("trial-jobs")

    def wait_for(self, condition, seconds):
        """Wait until the condition holds for the list of trials and return them."""
        self.wait_until(lambda: condition(self.get("trial-jobs")), seconds)
        return self.get("trial-jobs")

    def wait_until(self, condition, seconds):
        """Wait until the condition holds; a request costs NNI's manager about 20 ms of CPU time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                states = collections.Counter(trial["status"] for trial in self.get("trial-jobs"))
                raise TimeoutError(f"{self.get('check-status')}, {states} after {seconds} s")
            time.sleep(1)

    def trial_file(self, trial, name):
        path = self.home / "nni-experiments" / self.id / "trials" / trial["trialJobId"] / name
        return path.read_text()

    def stop(self):
        """Stop the experiment; kill and return the processes that are alive 30 seconds later."""
        for manager in processes_at(self.home, MANAGER):
            manager.terminate()  # as nnictl stop does, whose start takes a second
        psutil.wait_procs(processes_at(self.home), timeout=30)
        return kill_at(self.home)
