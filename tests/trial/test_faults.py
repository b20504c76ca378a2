"""Faults: killed trials, a full disk, too little memory, unusual names, wrong values."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny_cifar10
import torch
from tiny_cifar10 import DOWNLOADED, USED, assert_equals_torchvisions, names
from waiting import wait_for

from trial import data

QUICK = ["--dataset", "synthetic", "--batch-size", "1000", "--epochs", "1"]


def killed(program, number, is_time, *args):
    """Start train.py on a slow disk, and end it by a signal when is_time(program)."""
    trial = program("tiny_train.py", *args)
    wait_for(lambda: is_time(trial) or not trial.process.is_alive())
    os.kill(trial.process.pid, number)
    assert trial.wait() == (143 if number == signal.SIGTERM else -number), trial.stderr


def is_writing(trial):
    return "writing" in trial.stdout


by_either_signal = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])


@by_either_signal
def test_a_trial_is_killed_while_it_writes_the_cache(program, archive, tmp_path, number):
    folder = tmp_path / "data"
    tiny_cifar10.write(folder)
    killed(program, number, is_writing, archive, 0, "--data-dir", folder)
    assert not (folder / "cifar10.pt").exists()
    if number == signal.SIGTERM:
        assert names(folder) == ["cifar-10-batches-py", "cifar10.pt.lock"]
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert names(folder) == USED


@by_either_signal
def test_a_trial_is_killed_while_it_downloads(program, archive, tmp_path, number):
    folder = tmp_path / "data"
    with tiny_cifar10.server(archive, stalls=True) as (port, _):
        flags = [archive, port, "--data-dir", folder]
        killed(program, number, lambda _: (folder / archive.name).exists(), *flags)
    with tiny_cifar10.server(archive):
        assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert names(folder) == DOWNLOADED


@by_either_signal
def test_an_older_model_survives_a_trial_killed_while_it_saves(program, archive, tmp_path, number):
    folder = tmp_path / "models"
    folder.mkdir()
    model = folder / "model.pt"
    model.write_text("of the trial before")
    killed(program, number, is_writing, archive, 0, *QUICK, "--save", model)
    assert model.read_text() == "of the trial before"
    if number == signal.SIGTERM:
        assert names(folder) == ["model.pt"]


def test_a_full_disk(main, archive, tmpfs, capsys):
    """It has no room for the download, then none for the cache, at last none for a model."""
    folder = tmpfs(100)
    with tiny_cifar10.server(archive), pytest.raises(FileNotFoundError, match="No space left on"):
        data.load_cifar10(folder)
    subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)
    with tiny_cifar10.server(archive):
        data.load_cifar10(folder)
    (folder / "cifar10.pt").unlink()
    (folder / "fill").write_bytes(b"0" * (os.statvfs(folder).f_bavail * 4096 - 8192))
    capsys.readouterr()
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    line = "cannot write {}: No space left on device"
    assert line.format(folder / "cifar10.pt") in capsys.readouterr().err
    result = main(*QUICK, "--save", folder / "model.pt")
    assert result.returncode == 1
    assert result.stderr == f"train.py: error: {line.format(folder / 'model.pt')}\n"
    assert "Acc: " in result.stdout  # and has been reported
    assert names(folder) == sorted([*DOWNLOADED[:2], "cifar10.pt.lock", "fill"])


def test_out_of_memory_names_the_batch_size(program):
    result = program("little_memory.py", *QUICK)
    assert result.wait() == 1
    error = "train.py: error: batch_size is 1000; allowed: as many images as cpu has memory for"
    assert error in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_out_of_memory_on_a_gpu_names_the_batch_size(run):
    code = "import sys, torch, train; torch.cuda.set_per_process_memory_fraction(0.005)"
    flags = ["--dataset", "synthetic", "--batch-size", "10000"]
    result = run(*flags, code=f"{code}; train.main(sys.argv[1:])")
    assert result.returncode == 1
    assert "train.py: error: batch_size is 10000; allowed: as many images as cuda" in result.stderr
    assert "Traceback" not in result.stderr


def test_folders_may_have_unusual_names(main, archive, tmp_path):
    with contextlib.ExitStack() as stack:
        shared_memory = Path("/dev/shm")  # another file system than tmp_path's
        folders = [tmp_path / "with space", tmp_path / "数据", tmp_path / "link"]
        (tmp_path / "elsewhere").mkdir()
        folders[2].symlink_to(tmp_path / "elsewhere")
        if os.access(shared_memory, os.W_OK):
            folders.append(shared_memory / f"train.py test {os.getpid()}")
            stack.callback(shutil.rmtree, folders[-1], ignore_errors=True)
        for folder in folders:
            tiny_cifar10.write(folder)
            for _ in range(2):  # what torchvision decodes, and the cache
                assert_equals_torchvisions(data.load_cifar10(folder), folder)
            flags = ["--data-dir", folder, "--epochs", "1", "--save", folder / "模型 1.pt"]
            assert main(*flags).returncode == 0
            assert names(folder)[-2:] == ["cifar10.pt.lock", "模型 1.pt"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "10"],
        ["--lr", "10", "--optimizer", "Muon"],
        ["--momentum", "0.999"],
        ["--batch-size", "1000"],  # all images
        ["--batch-size", "1001"],
        ["--batch-size", str(10**20)],
        ["--weight-decay", "1e30"],
        ["--augment", "16"],
        ["--lr-schedule", "one_cycle", "--batch-size", "1000"],
    ],
    ids=" ".join,
)
def test_extreme_hyperparameters_give_an_accuracy(main, flags):
    result = main(*QUICK, "--batch-size", "200", *flags)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert 0 <= float(last.removeprefix("Acc: ").split("%")[0]) <= 100
