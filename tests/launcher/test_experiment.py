"""train.py in real experiments: NNI's manager, its scheduler, trials in processes of their own."""

import json
import shutil
import subprocess
import sys

import psutil
import pytest
import yaml
from conftest import BASELINE, ROOT
from experiment import NNICTL, accuracy, metric_value, parameters, printed_parameters, processes_at
from stand_ins import stand_in_nvidia_smi


def in_turn(*values):
    """Return the changes of a configuration by which its trials get these values in turn."""
    space = {"combine_params": {"_type": "choice", "_value": values}}
    return {"tuner": {"name": "BatchTuner"}, "searchSpace": space, "maxTrialNumber": len(values)}


def chosen(search, *args):
    """Return the trials that `choose.py --json` prints with the experiment's HOME."""
    command = [sys.executable, ROOT / "choose.py", "--json", *args]
    printed = subprocess.run(command, env=search.environment, check=True, capture_output=True)
    return json.loads(printed.stdout)["trials"]


# nnictl's manager gives its tuner ten seconds, which a busy machine may not keep to.
PATIENT = """
const { setTimeout: wait } = global;
global.setTimeout = (then, ms, ...more) => wait(then, ms === 10000 ? 60000 : ms, ...more);
"""


def test_nnictl_searches_with_the_trial_alone_from_create_to_export(
    experiment, environment, home, tmp_path
):
    (home / "patient.js").write_text(PATIENT)
    environment["NODE_OPTIONS"] = f"--require {home}/patient.js"
    project = tmp_path / "project"
    shutil.copytree(ROOT / "trial", project / "trial")
    shutil.copy(ROOT / "train.py", project)
    (project / "trial" / "fast.py").unlink()  # may be deleted
    (project / "nnisearch.py").write_text("raise ImportError('the trial runs without nnisearch')")
    stand_in_nvidia_smi(home, busy=[True, True, False, True])
    search = experiment(
        "config.yml",
        NNICTL,
        trialCodeDirectory=str(project),
        trialCommand="printenv CUDA_VISIBLE_DEVICES && python3 train.py --dataset synthetic"
        " --device cpu --report-every 50",
        **in_turn(
            {"batch_size": 128, "lr": 0.05, "epochs": 2},
            {"batch_size": 64, "lr": 0.01, "epochs": 1, "optimizer": "Adam"},
            {"batch_size": 0},
        ),
    )
    search.wait_for(lambda trials: "SUCCEEDED" in {trial["status"] for trial in trials}, 240)
    assert chosen(search)  # while it runs
    *trials, refused = search.wait(240)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 2
    assert refused["status"] == "FAILED"
    line = "train.py: error: tuner: batch_size is 0; allowed: an integer >= 1\n"
    assert search.trial_file(refused, "stderr") == line

    for trial in trials:
        assert search.trial_file(trial, "stdout") == "2\n"  # the free GPU
        assert search.trial_file(trial, "stderr") == ""
        log = search.trial_file(trial, "trial.log")
        proposed = parameters(trial)
        assert printed_parameters(log) == BASELINE | proposed
        metrics = search.get(f"metric-data/{trial['trialJobId']}")
        intermediate = [m for m in metrics if m["type"] == "PERIODICAL"]
        (final,) = (m for m in metrics if m["type"] == "FINAL")
        assert f"Acc: {metric_value(final):.3f}% (" in log
        losses = [metric_value(m) for m in intermediate]
        assert [line.split("loss: ")[1] for line in log.splitlines() if "loss: " in line] == [
            f"{loss:.3f}" for loss in losses
        ]
        batches = -(-10_000 // proposed["batch_size"])
        assert len(losses) == proposed["epochs"] * (batches // 50)

    out = search.home / "out.json"
    search.nnictl("experiment", "export", search.id, "-t", "json", "-i", "-f", out)
    assert search.stop() == []

    *results, last = chosen(search, search.id)
    assert (last["id"], last["result"]) == (refused["trialJobId"], None)
    assert [trial["id"] for trial in results] == [trial["trialJobId"] for trial in trials]
    for ours, nnis in zip(results, trials, strict=True):
        assert ours["trial"] == nnis["sequenceId"]
        assert ours["result"] == accuracy(nnis)
        assert ours["hyperparameters"] == parameters(nnis)
        duration = (nnis["endTime"] - nnis["startTime"]) / 1000
        assert ours["seconds"] == pytest.approx(duration, abs=0.01)
    for ours, exported in zip(results, chosen(search, "--file", out), strict=True):
        for key in ("id", "result", "intermediate", "hyperparameters"):
            assert ours[key] == exported[key]


def test_trials_of_multi_gpu_yml_get_two_gpus_each_and_end_without_a_trace(experiment, home):
    stand_in_nvidia_smi(home, busy=[False, True, False, False, False])
    config = ROOT / "configs" / "multi_gpu.yml"
    command = yaml.safe_load(config.read_text())["trialCommand"]
    command = command.replace("gpu train.py", "2 train.py --dataset synthetic --device cpu")
    search = experiment(
        config,
        trialCommand=f"printenv CUDA_VISIBLE_DEVICES && {command} --report-every 50",
        **in_turn({"batch_size": 1000, "epochs": 1}, {"batch_size": 8, "epochs": 1000}),
    )
    _, endless = search.wait_for(lambda trials: len(trials) == 2, 240)
    search.wait_until(lambda: search.get(f"metric-data/{endless['trialJobId']}"), 240)
    running = processes_at(home, "train.py")
    assert len(running) >= 3  # torchrun and its two, and the shell that NNI starts
    search.request("DELETE", f"trial-jobs/{endless['trialJobId']}")
    _, alive = psutil.wait_procs(running, timeout=120)
    assert alive == []

    trials = search.wait(120)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED", "USER_CANCELED"]
    assert [search.trial_file(trial, "stdout") for trial in trials] == ["0,2\n", "3,4\n"]
    logs = [search.trial_file(trial, "trial.log") for trial in trials]
    for log in logs:
        assert "Training on cpu, one of 2 processes" in log
        assert log.count("Hyperparameters: ") == 1
    assert logs[0].count("Acc: ") == 1
    assert search.stop() == []
