"""Every configuration of this project loads, and train.py accepts its search space."""

import json

import pytest
from conftest import BASELINE, ROOT

import search
import train
from nnisearch.before import checks, config, gpus

CONFIGS = sorted([ROOT / "config.yml", *ROOT.glob("configs/*.yml")])
WRITE_UPS_BEST = BASELINE | {"batch_size": 64, "lr": 0.014, "epochs": 10}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_accepted_and_suits_train_py(path, monkeypatch):
    monkeypatch.setattr(gpus, "gpus", lambda: [[], []])
    loaded, lines = config.load(path)
    assert lines == checks.check(loaded) == []
    assert str(loaded.trial_code_directory) == str(ROOT)
    search.check(loaded)
    train.parse_args(loaded.trial_command.split(" train.py")[1].split())
    arguments = dict(loaded.tuner.class_args)
    assert arguments.pop("optimize_mode") == "maximize"
    if loaded.tuner.name != "TPE":  # it learns from half of the search on
        assert loaded.tuner.code_directory == str(ROOT)
        assert loaded.tuner.class_name == "nnisearch.tuners.OptunaTuner"
        assert arguments["sampler"] == "GPSampler"
        assert arguments["sampler_args"]["n_startup_trials"] <= loaded.max_trial_number / 2


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
    args = train.parse_args(["--params", str(path)])
    assert vars(args).items() >= json.loads(path.read_text()).items()
