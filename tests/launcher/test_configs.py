"""Every configuration loads with NNI's own class, and train.py accepts its search space."""

import json
import re

import pytest
from conftest import BASELINE, ROOT
from nni.experiment.config import ExperimentConfig

import train

CONFIGS = sorted([ROOT / "config.yml", *ROOT.glob("configs/*.yml")])
WRITE_UPS_BEST = BASELINE | {"batch_size": 64, "lr": 0.014, "epochs": 10}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths are relative to the file
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()  # remote.yml's key, whose existence NNI checks
    config = ExperimentConfig.load(request.param).canonical_copy()
    config.validate()
    return config


def edges(values):
    """Return the values of a search space's entry that train.py has to accept for all to be."""
    return values["_value"] if values["_type"] == "choice" else values["_value"][:2]


def test_the_configuration_runs_train_py_from_any_folder(config):
    command = config.trial_command
    assert str(config.trial_code_directory) == str(ROOT)
    assert re.search(r"\b(python3|torchrun --standalone --nproc-per-node=gpu) train\.py", command)


def test_the_tuner_learns_from_half_of_the_search_on_unless_it_is_nnis(config):
    arguments = dict(config.tuner.class_args)
    if config.tuner.name != "TPE":
        assert config.tuner.code_directory == str(ROOT)
        assert config.tuner.class_name == "nnisearch.tuners.OptunaTuner"
        assert arguments.pop("sampler") == "GPSampler"
        assert arguments.pop("sampler_args")["n_startup_trials"] <= config.max_trial_number / 2
    assert arguments == {"optimize_mode": "maximize"}


def test_the_flags_of_the_trial_command_exist(config):
    train.parse_args(config.trial_command.split("train.py")[1].split())


def test_the_search_space_holds_what_train_py_accepts(config):
    for key, values in config.search_space.items():
        for value in edges(values):
            train.set_hyperparameters(train.parse_args([]), {key: value}, "search space")


@pytest.mark.parametrize("point", [BASELINE, WRITE_UPS_BEST], ids=["baseline", "write-up"])
def test_the_search_space_reaches(point):
    space = json.loads((ROOT / "search_space.json").read_text())
    for key, value in point.items():
        entry = space.get(key, {"_type": "choice", "_value": [BASELINE[key]]})
        values = entry["_value"]
        if entry["_type"] == "choice":
            assert value in values
        else:
            assert values[0] <= value <= values[1]


def test_the_fast_hyperparameters_are_accepted():
    path = ROOT / "configs" / "params" / "fast.json"
    assert (
        vars(train.parse_args(["--params", str(path)])).items()
        >= json.loads(path.read_text()).items()
    )


def test_each_configuration_has_the_settings_of_its_purpose():
    settings = {path.stem: ExperimentConfig.load(path) for path in CONFIGS}
    gpu, cpu, demo = settings["config"], settings["cpu"], settings["demo"]
    assert (gpu.trial_gpu_number, gpu.trial_concurrency, gpu.max_trial_number) == (1, 1, 30)
    assert gpu.training_service.use_active_gpu is False
    assert (cpu.trial_gpu_number, cpu.trial_concurrency, cpu.max_trial_number) == (0, 2, 30)
    multi, remote = settings["multi_gpu"], settings["remote"]
    assert (multi.trial_gpu_number, multi.trial_concurrency, multi.max_trial_number) == (2, 2, 30)
    platforms = {name: config.training_service.platform for name, config in settings.items()}
    assert platforms == dict.fromkeys(settings, "local") | {"remote": "remote"}
    assert len(remote.training_service.machine_list) == 2
    assert (demo.trial_gpu_number, demo.trial_concurrency, demo.max_trial_number) == (0, 2, 9)
    assert "--dataset synthetic" in demo.trial_command
    wide = settings["wide"]
    assert (wide.trial_gpu_number, wide.trial_concurrency, wide.max_trial_number) == (0, 2, 24)
    assert "--validate" in wide.trial_command
    for config in (cpu, demo, wide):
        assert config.trial_command.startswith("OMP_NUM_THREADS=1 ")
        assert config.tuner.class_name == "nnisearch.tuners.OptunaTuner"
    for config in (gpu, multi, remote):
        assert config.tuner.name == "TPE"
