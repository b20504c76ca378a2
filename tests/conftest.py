"""What several test files use: the script as a user starts it, and CIFAR-10 where it is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from experiment import Experiment, processes_at  # noqa: E402


def settings(**values):
    """Return train.py's settings for the baseline with other values."""
    import train

    args = train.parse_args([])
    vars(args).update(values)
    return args


@pytest.fixture
def environment():
    """The environment of a child process: no CIFAR-10 that happens to be here, one thread."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NNI_", "CIFAR10_"))}
    return environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture
def start(environment, tmp_path):
    """Start `python train.py ...`, or `python -c code ...`, in an empty folder, without waiting.

    processes is how many torchrun starts of it; without it there is no torchrun.
    """

    def start(*args, code=None, processes=None):
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        if code and processes:
            (tmp_path / "trial.py").write_text(code)
            command.append(tmp_path / "trial.py")
        else:
            command += ["-c", code] if code else [ROOT / "train.py"]
        return subprocess.Popen(
            [str(part) for part in (*command, *args)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """Start as above and wait; return what was printed, with the exit status in returncode."""

    def run(*args, **how):
        with start(*args, **how) as process:
            stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


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
def experiment(tmp_path, environment):
    """Start an experiment, of which nothing is left when the test ends, however it ends."""
    home = tmp_path / "home"
    home.mkdir()
    yield lambda config, **changes: Experiment(ROOT / config, home, environment, **changes)
    for process in processes_at(home):
        process.kill()
