"""What several test files use: the script as a user starts it, and CIFAR-10 where it is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASELINE = {"batch_size": 4, "lr": 0.001, "epochs": 2, "optimizer": "SGD", "momentum": 0.9}
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


@pytest.fixture
def environment():
    """The environment of a child process: no CIFAR-10 that happens to be here, one thread."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NNI_", "CIFAR10_"))}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture
def start(environment, tmp_path):
    """Start `python train.py ...`, or `python -c code ...`, in an empty folder, without waiting."""

    def start(*args, code=None):
        command = [sys.executable, *(["-c", code] if code else [ROOT / "train.py"])]
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

    def run(*args, code=None):
        with start(*args, code=code) as process:
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
