"""Several processes per trial: they train as one does, one talks to NNI, all end together."""

import contextlib
import json
import signal

import psutil
import pytest
import torch
from experiment import free_port
from forked import SUPPORT

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


EVERYTHING = "--augment 2 --optimizer Muon --lr 0.01 --weight-decay 0.1 --label-smoothing 0.1"
EVERYTHING += " --lr-schedule one_cycle --validate --tta"


@pytest.mark.parametrize(("count", "more"), [(2, EVERYTHING), (3, "")])
def test_several_processes_train_as_one_does(processes, program, tmp_path, count, more):
    # The processes share the last batch, too: 72 images as 36 + 36, or 80 as 27 + 27 + 26.
    flags = [*QUICK, *more.split(), "--batch-size", "192", "--report-every", "2", "--save"]
    one = program("double_train.py", *flags, tmp_path / "one.pt")
    assert one.wait() == 0, one.stderr
    several = processes(count, "double_train.py", *flags, tmp_path / "several.pt")
    assert [each.process.exitcode for each in several] == [0] * count, several[0].stderr
    device = f"Training on cpu, one of {count} processes"
    assert several[0].stdout == one.stdout.replace("Training on cpu", device)
    assert several[0].stdout.count(" loss: ") >= 4
    assert [each.stdout for each in several[1:]] == [""] * (count - 1)
    weights = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "several.pt"))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", ["5", "1"])
def test_a_batch_must_be_a_multiple_of_the_processes(processes, size):
    for each in processes(2, "../../train.py", *QUICK, "--batch-size", size):
        assert each.process.exitcode == 1
        line = f"batch_size is {size}; allowed: a multiple of 2, the processes of the trial"
        assert f"train.py: error: {line}\n" in each.stderr


def test_one_process_talks_to_nni_for_all(processes):
    tuned = json.dumps({"batch_size": 100, "lr": 0.02})
    first, second = processes(2, "one_voice.py", tuned, *QUICK, "--report-every", "50")
    assert (first.process.exitcode, second.process.exitcode) == (0, 0), first.stderr + second.stderr
    printed = first.stdout.splitlines()
    values = json.loads(printed[0].removeprefix("Hyperparameters: "))
    assert (values["batch_size"], values["lr"]) == (100, 0.02)
    assert [line.split(":")[0] for line in printed if ": " in line][-4:] == [
        "[1,   100] loss",
        "intermediate",
        "Acc",
        "final",
    ]
    assert sum(line.startswith("intermediate: ") for line in printed) == 2
    assert printed[-2].startswith(f"Acc: {float(printed[-1].split()[1]):.3f}%")


def test_all_end_when_one_fails(run):
    result = run(*QUICK, program=SUPPORT / "second_fails.py", processes=2)
    assert result.returncode != 0
    assert "RuntimeError: the second process has no memory left" in result.stderr


def test_all_processes_end_with_torchrun(start):
    with start(*QUICK, "--epochs", "1000", "--report-every", "10", processes=2) as process:
        while " loss: " not in process.stdout.readline():
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(children, timeout=60)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()
        assert alive == []
        process.communicate(timeout=60)
