"""Real experiments: nnictl, NNI's manager and scheduler, trials in processes of their own."""

import json

import pytest
from conftest import ROOT
from experiment import Experiment, processes_at

# What a search in a test covers: trials of a few seconds.
SPACE = {
    "batch_size": {"_type": "choice", "_value": [32, 64, 128]},
    "lr": {"_type": "loguniform", "_value": [0.01, 0.1]},
    "epochs": {"_type": "choice", "_value": [1, 2]},
    "optimizer": {"_type": "choice", "_value": ["SGD", "Adam"]},
    "momentum": {"_type": "uniform", "_value": [0.5, 0.95]},
}


@pytest.fixture
def experiment(tmp_path, environment):
    """Start an experiment, of which nothing is left when the test ends, however it ends."""
    home = tmp_path / "home"
    home.mkdir()
    yield lambda config, **changes: Experiment(ROOT / config, home, environment, **changes)
    for process in processes_at(home):
        process.kill()


def test_a_search_from_create_to_export(experiment):
    demo = experiment("configs/demo.yml", maxTrialNumber=4, searchSpace=SPACE)
    trials = demo.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 4

    for trial in trials:
        log = demo.trial_file(trial, "trial.log")
        (given,) = (json.loads(text)["parameters"] for text in trial["hyperParameters"])
        assert json.loads(log.split("Hyperparameters: ")[1].splitlines()[0]) == given

        metrics = demo.get(f"metric-data/{trial['trialJobId']}")
        intermediate = [m for m in metrics if m["type"] == "PERIODICAL"]
        (final,) = (m for m in metrics if m["type"] == "FINAL")
        accuracy = json.loads(json.loads(final["data"]))
        assert f"Acc: {accuracy:.3f}% (" in log
        losses = [json.loads(json.loads(m["data"])) for m in intermediate]
        assert [line.split("loss: ")[1] for line in log.splitlines() if "loss: " in line] == [
            f"{loss:.3f}" for loss in losses
        ]
        window = min(50, -(-10_000 // given["batch_size"]))
        assert len(losses) == given["epochs"] * (-(-10_000 // given["batch_size"]) // window)
        assert demo.trial_file(trial, "stderr") == ""

    demo.nnictl("experiment", "export", demo.id, "-t", "json", "-f", demo.home / "out.json")
    exported = json.loads((demo.home / "out.json").read_text())
    assert len(exported) == 4
    assert demo.stop() == []


def test_a_refused_value_fails_the_trial_and_stands_in_its_stderr(experiment):
    space = {"batch_size": {"_type": "choice", "_value": [0]}}
    demo = experiment("configs/demo.yml", maxTrialNumber=1, searchSpace=space)
    (trial,) = demo.wait(120)
    assert trial["status"] == "FAILED"
    line = "train.py: error: tuner: batch_size is 0; allowed: an integer >= 1\n"
    assert demo.trial_file(trial, "stderr") == line
    assert demo.stop() == []


def test_every_trial_of_config_yml_gets_the_free_gpu(experiment, tmp_path):
    gpu = (
        "<gpu><processes>{}</processes><utilization><gpu_util>0 %</gpu_util>{}</utilization></gpu>"
    )
    memory = "<memory_util>0 %</memory_util>"
    busy = gpu.format("<process_info><pid>1</pid></process_info>", memory)
    answer = f"<nvidia_smi_log>{busy * 2}{gpu.format('', memory)}{busy}</nvidia_smi_log>"
    stand_in = tmp_path / "home" / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\ncat <<END\n{answer}\nEND\n")
    stand_in.chmod(0o755)
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
