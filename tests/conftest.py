"""What several test files use: the script as a user starts it, and CIFAR-10 where it is found."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
import yaml

# Several files run at a time, and threads of torch would wait for each other. Before its import.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
BASELINE = {
    "batch_size": 4,
    "lr": 0.001,
    "epochs": 2,
    "optimizer": "SGD",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "lr_schedule": "constant",
    "augment": 0,
}
# What a search in a test covers: trials of a few seconds.
SPACE = {
    "batch_size": {"_type": "choice", "_value": [32, 64, 128]},
    "lr": {"_type": "loguniform", "_value": [0.01, 0.1]},
    "epochs": {"_type": "choice", "_value": [1, 2]},
    "optimizer": {"_type": "choice", "_value": ["SGD", "Adam"]},
    "momentum": {"_type": "uniform", "_value": [0.5, 0.95]},
}
# Where the search is tested, and not train.py: a trial that costs next to nothing.
LIGHT_TRIAL = "python3 tests/support/light_trial.py"
ENDLESS = SPACE | {"epochs": {"_type": "choice", "_value": [1000]}}
STATUS = "/api/v1/nni/check-status"
# A web socket's first request.
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
UPGRADE.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from experiment import SEARCH, UNCHECKED, Experiment, kill_at  # noqa: E402


def pytest_collection_modifyitems(items):
    """Mark as slow what starts an experiment, or train.py as a process: that imports torch anew.

    Tests with forks come first: so the first of several workers has all of them, and the others
    need no process that imports torch to be forked.
    """
    items.sort(key=lambda item: "program" not in item.fixturenames)
    for item in items:
        if {"experiment", "start_search", "guarded", "start", "cluster"} & set(item.fixturenames):
            item.add_marker("slow")


def settings(**values):
    """Return train.py's settings for the baseline with other values."""
    import train

    args = train.parse_args([])
    vars(args).update(values)
    return args


def ask(port, *headers, path=STATUS, method="GET", body="", address="127.0.0.1", user=None):
    """Return the status of the port's answer to a request, None if it hangs up or does not listen.

    Bash asks, because that can be another user's process.
    """
    lines = "".join(f"{header}\r\n" for header in headers)
    if "Host: " not in lines:
        lines += f"Host: localhost:{port}\r\n"
    request = f"{method} {path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n"
    request += f"Content-Type: application/json\r\n\r\n{body}"
    bash = f"exec 3<>/dev/tcp/{address}/{port} && cat >&3 && timeout 20 head -1 <&3"
    answer = subprocess.run(
        ["bash", "-c", bash], input=request, capture_output=True, text=True, user=user, cwd="/"
    ).stdout
    return int(answer.split()[1]) if answer else None


def outside_address():
    """Return an address of this machine that is not the loopback's."""
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return entry.address
    pytest.skip("this machine has no address but the loopback's")


def writable(folder):
    """Return what below the folder everybody may write."""
    command = ["find", folder, "-not", "-type", "l", "-perm", "/o+w"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def nobody():
    """Return the number of a user that is not this one."""
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    return 65534


def as_process(capsys, function, *args, **how):
    """Call a command's function in this process; return what it prints and its exit status."""
    capsys.readouterr()
    end = None
    try:
        function(*args, **how)
    except SystemExit as exit:
        end = exit.code
    out, err = capsys.readouterr()
    if isinstance(end, str):  # as Python does
        err, end = f"{err}{end}\n", 1
    return subprocess.CompletedProcess(args, end or 0, out, err)


@pytest.fixture
def environment():
    """The environment of a child process: no CIFAR-10 that happens to be here, one thread."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NNI_", "CIFAR10_"))}
    return environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}


@pytest.fixture
def start(environment, tmp_path):
    """Start `python train.py ...`, or another program or code, in an empty folder, without waiting.

    processes is the number of processes that torchrun starts; without it there is no torchrun.
    """

    def start(*args, program=ROOT / "train.py", code=None, processes=None):
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        command += ["-c", code] if code else [program]
        return subprocess.Popen(
            [str(part) for part in (*command, *args)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def to_its_end(start):
    """Return a function that starts a process by start, waits, and returns what run() does."""

    def run(*args, **how):
        with start(*args, **how) as process:
            stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture
def run(start):
    """Start as above and wait; return what was printed, with the exit status in returncode."""
    return to_its_end(start)


@pytest.fixture
def program(environment, tmp_path):
    """Start a program of tests/support/ as a fork of a process that has imported torch."""
    from forked import SUPPORT, Program

    started = []

    def program(name, *args, stderr=None, **variables):
        folder = tmp_path / f"program {len(started)}"
        folder.mkdir()
        started.append(
            Program(SUPPORT / name, args, folder, environment | variables, stderr=stderr)
        )
        return started[-1]

    yield program
    for each in started:
        each.process.kill()


@pytest.fixture
def kernels():
    """Leave torch's threads and kernels as they were."""
    import torch

    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn


@pytest.fixture(scope="session")
def synthetic():
    """The synthetic data set, made once."""
    from trial import data

    return data.make_synthetic()


@pytest.fixture
def main(capsys, kernels, monkeypatch):
    """Call train.main(flags) in this process; return what it prints, and its exit status.

    Its synthetic data set is the one of few_images.py.
    """
    import few_images

    import train

    monkeypatch.setattr("trial.data.make_synthetic", few_images.make)

    def main(*flags):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NNI says that there is no tuner
            return as_process(capsys, train.main, [str(flag) for flag in flags])

    return main


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive of the tiny data set, which torchvision takes for CIFAR-10 in this test."""
    import tiny_cifar10
    from torchvision.datasets import CIFAR10

    for name in ("train_list", "test_list", "meta", "tgz_md5", "url"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    (tmp_path / "archive").mkdir()
    archive = tiny_cifar10.write_archive(tmp_path / "archive")
    tiny_cifar10.expect(archive)
    return archive


@pytest.fixture
def cifar10_dir(tmp_path):
    """A folder of the test's own with the real CIFAR-10 in it, and without a cache."""
    if not os.environ.get("CIFAR10_DIR"):
        pytest.skip("needs the real CIFAR-10: set CIFAR10_DIR to the folder that holds it")
    folder = tmp_path / "data"
    folder.mkdir()
    name = "cifar-10-batches-py"
    (folder / name).symlink_to(Path(os.environ["CIFAR10_DIR"]).resolve() / name)
    return folder


@pytest.fixture
def home(tmp_path):
    """A HOME of the test's own, of which no process is left when the test ends."""
    home = tmp_path / "home"
    home.mkdir()
    yield home
    kill_at(home)


def read_until(process, part):
    """Return the line of a search's output that holds a part."""
    for line in process.stdout:
        if part in line:
            return line
    raise AssertionError(f"no {part!r}: {process.stderr.read()}")


@pytest.fixture
def start_search(home, environment):
    """Start `python search.py ...` in its HOME without waiting, and kill it at the end.

    config is its configuration, how replaces search.py, before is a command that starts it.
    """

    @contextlib.contextmanager
    def start_search(*args, config=None, how=SEARCH, before=(), **variables):
        if config:
            (home / "config.yml").write_text(yaml.safe_dump(config))
            args = (home / "config.yml", *args)
        process = subprocess.Popen(
            [str(part) for part in (*before, sys.executable, *how, *args)],
            env=environment | {"HOME": str(home), "TMPDIR": str(home)} | variables,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # These signals end it, also where the tests run in the background or by nohup.
            preexec_fn=lambda: [
                signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
            ],
        )
        with process:
            try:
                yield process
            finally:
                process.kill()  # which does nothing to one that has ended

    return start_search


@pytest.fixture
def run_search(start_search):
    """Start as above and wait; return what was printed, with the exit status in returncode."""
    return to_its_end(start_search)


@pytest.fixture
def experiment(home, environment):
    """Start an experiment, of which nothing is left when the test ends, however it ends."""

    def start(config, how=UNCHECKED, **changes):
        return Experiment(ROOT / config, home, environment, how, **changes)

    return start


@pytest.fixture
def tmpfs(tmp_path):
    """Mount a disk of so many kB and return its folder, which is unmounted at the end."""
    mounted = []

    def tmpfs(kilobytes, name="small disk"):
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield tmpfs
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
