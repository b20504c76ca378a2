"""Real experiments: nnictl, NNI's manager and scheduler, trials in processes of their own."""

import json
import subprocess
import sys

import psutil
import pytest
import yaml
from conftest import BASELINE, ROOT, SPACE
from experiment import (
    SEARCH,
    accuracy,
    metric_value,
    parameters,
    printed_parameters,
    processes_at,
)
from stand_ins import stand_in_nvidia_smi


def chosen(search, *args):
    """Return what `choose.py --json` prints with the experiment's HOME."""
    command = [sys.executable, ROOT / "choose.py", "--json", *args]
    printed = subprocess.run(command, env=search.environment, check=True, capture_output=True)
    return json.loads(printed.stdout)


def test_a_search_from_create_to_export(experiment):
    demo = experiment("configs/demo.yml", SEARCH, maxTrialNumber=4, searchSpace=SPACE)
    demo.wait_for(lambda trials: "SUCCEEDED" in {trial["status"] for trial in trials}, 120)
    assert chosen(demo)["trials"]  # while it runs
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 4

    for trial in trials:
        log = demo.trial_file(trial, "trial.log")
        given = parameters(trial)
        assert printed_parameters(log) == BASELINE | given

        metrics = demo.get(f"metric-data/{trial['trialJobId']}")
        intermediate = [m for m in metrics if m["type"] == "PERIODICAL"]
        (final,) = (m for m in metrics if m["type"] == "FINAL")
        assert f"Acc: {metric_value(final):.3f}% (" in log
        losses = [metric_value(m) for m in intermediate]
        assert [line.split("loss: ")[1] for line in log.splitlines() if "loss: " in line] == [
            f"{loss:.3f}" for loss in losses
        ]
        window = min(50, -(-10_000 // given["batch_size"]))
        assert len(losses) == given["epochs"] * (-(-10_000 // given["batch_size"]) // window)
        assert demo.trial_file(trial, "stderr") == ""

    demo.nnictl("experiment", "export", demo.id, "-t", "json", "-i", "-f", demo.home / "out.json")
    assert demo.stop() == []

    results = chosen(demo, demo.id)["trials"]
    assert [trial["id"] for trial in results] == [trial["trialJobId"] for trial in trials]
    for ours, nnis in zip(results, trials, strict=True):
        assert ours["trial"] == nnis["sequenceId"]
        assert ours["result"] == accuracy(nnis)
        assert ours["hyperparameters"] == parameters(nnis)
        duration = (nnis["endTime"] - nnis["startTime"]) / 1000
        assert ours["seconds"] == pytest.approx(duration, abs=0.01)
    exported = chosen(demo, "--file", demo.home / "out.json")["trials"]
    keys = ("id", "result", "intermediate", "hyperparameters")
    by_id = {trial["id"]: {key: trial[key] for key in keys} for trial in exported}
    assert by_id == {trial["id"]: {key: trial[key] for key in keys} for trial in results}


def test_a_refused_value_fails_the_trial_and_stands_in_its_stderr(experiment):
    space = {"batch_size": {"_type": "choice", "_value": [0]}}
    demo = experiment("configs/demo.yml", maxTrialNumber=1, searchSpace=space)
    (trial,) = demo.wait(120)
    assert trial["status"] == "FAILED"
    line = "train.py: error: tuner: batch_size is 0; allowed: an integer >= 1\n"
    assert demo.trial_file(trial, "stderr") == line
    assert demo.stop() == []


def test_every_trial_of_config_yml_gets_the_free_gpu(experiment, tmp_path):
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, True, False, True])
    search = experiment(
        "config.yml",
        trialCommand="printenv CUDA_VISIBLE_DEVICES && python3 train.py --dataset synthetic"
        " --device cpu",
        searchSpace=SPACE,
        maxTrialNumber=2,
    )
    trials = search.wait(180)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 2
    assert [search.trial_file(trial, "stdout") for trial in trials] == ["2\n"] * 2
    assert search.stop() == []


def test_two_trials_of_multi_gpu_yml_get_two_gpus_each(experiment, tmp_path):
    stand_in_nvidia_smi(tmp_path / "home", busy=[False] * 4)
    config = ROOT / "configs" / "multi_gpu.yml"
    command = yaml.safe_load(config.read_text())["trialCommand"]
    command = command.replace("gpu train.py", "2 train.py --dataset synthetic --device cpu")
    search = experiment(
        config,
        trialCommand=f"printenv CUDA_VISIBLE_DEVICES && {command} --report-every 50",
        searchSpace=SPACE,
        maxTrialNumber=2,
    )
    trials = search.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 2
    assert {search.trial_file(trial, "stdout") for trial in trials} == {"0,1\n", "2,3\n"}
    for trial in trials:
        log = search.trial_file(trial, "trial.log")
        assert "Training on cpu, one of 2 processes" in log
        assert log.count("Acc: ") == log.count("Hyperparameters: ") == 1
    assert search.stop() == []


def test_nothing_is_left_of_a_trial_of_two_processes_that_nni_kills(experiment):
    demo = experiment(
        "configs/demo.yml",
        trialCommand="torchrun --standalone --nproc-per-node=2 train.py --dataset synthetic"
        " --device cpu --report-every 50",
        searchSpace=SPACE | {"epochs": {"_type": "choice", "_value": [1000]}},
        trialConcurrency=1,
        maxTrialNumber=1,
    )
    (trial,) = demo.wait_for(lambda _: demo.get("metric-data"), 120)
    running = processes_at(demo.home, "train.py")
    assert len(running) >= 3  # torchrun and its two, and the shell that NNI starts
    demo.nnictl("trial", "kill", demo.id, "-T", trial["trialJobId"])
    _, alive = psutil.wait_procs(running, timeout=60)
    assert alive == []
    (trial,) = demo.wait(60)
    assert trial["status"] == "USER_CANCELED"
    assert demo.stop() == []
