"""A trial of several processes, as torchrun starts them: the same training, one voice, one end."""

import contextlib
import json
import signal

import psutil
import pytest
import torch
from test_script import TRIAL

QUICK = ["--dataset", "synthetic", "--device", "cpu", "--lr", "0.05", "--epochs", "1"]


# Computes with 64 bits: with 32 the rounding grows until the losses differ visibly. That takes its
# time, so of fewer images.
DOUBLE = """
import sys, torch, train
from trial import data
torch.set_default_dtype(torch.float64)
make_synthetic = data.make_synthetic
data.make_synthetic = lambda: [tensor[:2000] for tensor in make_synthetic()]
train.main(sys.argv[1:])
"""


EVERYTHING = "--augment 2 --optimizer Muon --lr 0.01 --weight-decay 0.1 --label-smoothing 0.1"
EVERYTHING += " --lr-schedule one_cycle --validate --tta"


@pytest.mark.parametrize(("processes", "more"), [(2, EVERYTHING), (3, "")])
def test_several_processes_train_as_one_does(run, tmp_path, processes, more):
    # The epoch's last batch has 80 images, or of 1,800 72: 36 + 36, or 27 + 27 + 26.
    flags = [*QUICK, *more.split(), "--batch-size", "192", "--report-every", "2", "--save"]
    one = run(*flags, tmp_path / "one.pt", code=DOUBLE)
    several = run(*flags, tmp_path / "several.pt", code=DOUBLE, processes=processes)
    assert several.returncode == 0, several.stderr
    device = f"Training on cpu, one of {processes} processes"
    assert several.stdout == one.stdout.replace("Training on cpu", device)
    assert several.stdout.count(" loss: ") >= 4
    weights = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "several.pt"))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flags", [["--batch-size", "5"], ["--batch-size", "1"]])
def test_a_batch_that_cannot_be_split_evenly_is_refused(run, flags):
    result = run(*QUICK, *flags, processes=2)
    assert result.returncode != 0
    line = f"batch_size is {flags[1]}; allowed: a multiple of 2, the processes of the trial"
    assert f"train.py: error: {line}\n" in result.stderr


def test_one_process_talks_to_nni_for_all(run, environment):
    environment["NNI_PLATFORM"] = "unittest"
    environment["NNI_TRIAL_JOB_ID"] = "trial"
    only_the_first = """
import os, nni
if os.environ["RANK"] != "0":
    del nni.get_next_parameter, nni.report_intermediate_result, nni.report_final_result
"""
    code = TRIAL.replace("print(json.dumps(sent))", "if sent: print(json.dumps(sent))")
    tuned = json.dumps({"batch_size": 100, "lr": 0.02})
    flags = [flag for flag in QUICK if flag not in ("--lr", "0.05")]
    result = run(tuned, *flags, "--report-every", "50", code=only_the_first + code, processes=2)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    printed_values = json.loads(printed[0].removeprefix("Hyperparameters: "))
    assert (printed_values["batch_size"], printed_values["lr"]) == (100, 0.02)
    sent = json.loads(printed[-1])
    assert [metric["type"] for metric in sent] == ["PERIODICAL", "PERIODICAL", "FINAL"]
    assert printed[-2].startswith(f"Acc: {sent[-1]['value']:.3f}%")


def test_all_end_when_one_fails(run):
    code = """
import os, sys, train
def fail(*_):
    raise RuntimeError("the second process has no memory left")
if os.environ["RANK"] == "1":
    train.train_step = fail
train.main(sys.argv[1:])
"""
    result = run(*QUICK, code=code, processes=2)
    assert result.returncode != 0
    assert "RuntimeError: the second process has no memory left" in result.stderr


def test_no_process_is_left_when_torchrun_is_terminated(start):
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
