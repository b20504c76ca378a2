"""Several processes per trial: they train as one does, one talks to NNI, all end together."""

import contextlib
import json

import psutil
import pytest
import torch
from conftest import ROOT
from experiment import free_port
from torch.distributed import run
from waiting import wait_for

QUICK = ["--dataset", "synthetic", "--device", "cpu", "--lr", "0.05", "--epochs", "1"]


@pytest.fixture
def processes(program):
    """Run a program as several processes, with torchrun's environment; return them at their end."""

    def processes(count, name, *args):
        shared = {"WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        started = [program(name, *args, **shared, **rank) for rank in ranks]
        for each in started:
            each.wait()
        return started

    return processes


# They share the last batch of 96, too: 16 images as 6 + 5 + 5. Of 2 images, one process has none.
@pytest.mark.parametrize(("batch_size", "report_every"), [(96, 2), (2, 100)])
def test_several_processes_train_as_one_does(
    processes, program, tmp_path, batch_size, report_every
):
    flags = [*QUICK, "--batch-size", batch_size, "--report-every", report_every, "--tta"]
    flags += ["--optimizer", "Muon", "--lr", "0.01", "--weight-decay", "0.1", "--augment", "2"]
    flags += ["--label-smoothing", "0.1", "--lr-schedule", "one_cycle", "--save"]
    one = program("double_train.py", *flags, tmp_path / "one.pt")
    several = processes(3, "double_train.py", *flags, tmp_path / "several.pt")
    assert one.wait() == 0, one.stderr
    assert [each.process.exitcode for each in several] == [0] * 3, several[0].stderr
    device = "Training on cpu, one of 3 processes"
    assert several[0].stdout == one.stdout.replace("Training on cpu", device)
    assert several[0].stdout.count(" loss: ") == 2
    assert [each.stdout for each in several[1:]] == [""] * 2
    weights = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "several.pt"))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def test_one_process_talks_to_nni_for_all(processes):
    tuned = json.dumps({"batch_size": 100, "lr": 0.02})
    first, second = processes(2, "one_voice.py", tuned, *QUICK, "--report-every", "5")
    assert (first.process.exitcode, second.process.exitcode) == (0, 0), first.stderr + second.stderr
    printed = first.stdout.splitlines()
    values = json.loads(printed[0].removeprefix("Hyperparameters: "))
    assert (values["batch_size"], values["lr"]) == (100, 0.02)
    assert [line.split(":")[0] for line in printed if ": " in line][-4:] == [
        "[1,    10] loss",
        "intermediate",
        "Acc",
        "final",
    ]
    assert sum(line.startswith("intermediate: ") for line in printed) == 2
    assert printed[-2].startswith(f"Acc: {float(printed[-1].split()[1]):.3f}%")


def test_all_end_when_one_fails(processes):
    first, second = processes(2, "second_fails.py", *QUICK)
    assert first.process.exitcode != 0
    assert second.process.exitcode != 0
    assert "RuntimeError: the second process has no memory left" in second.stderr


def test_all_processes_end_with_torchrun(program):
    how = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork"]
    flags = [*QUICK, "--epochs", "1000", "--report-every", "2"]
    torchrun = program(run.__file__, *how, ROOT / "train.py", *flags)
    wait_for(lambda: " loss: " in torchrun.stdout or not torchrun.process.is_alive())
    children = psutil.Process(torchrun.process.pid).children(recursive=True)
    assert len(children) == 2
    torchrun.process.terminate()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
    assert alive == []
    torchrun.wait()
