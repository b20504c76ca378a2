"""tuner.py: Optuna's samplers and Hyperband, as NNI calls them and in real searches."""

import json
import math

import pytest
import tuners
from conftest import ROOT, SPACE
from experiment import SEARCH, accuracy, parameters

from nnisearch.tuners import Hyperband, OptunaTuner

KINDS = {
    "names": {"_type": "choice", "_value": ["a", None, True]},
    "sizes": {"_type": "choice", "_value": [64, 4, 16]},
    "randint": {"_type": "randint", "_value": [-2, 3]},
    "uniform": {"_type": "uniform", "_value": [-1, 2]},
    "quniform": {"_type": "quniform", "_value": [0, 1, 0.25]},
    "loguniform": {"_type": "loguniform", "_value": [0.001, 0.1]},
    "qloguniform": {"_type": "qloguniform", "_value": [1, 100, 10]},
    "normal": {"_type": "normal", "_value": [5, 2]},
    "qnormal": {"_type": "qnormal", "_value": [5, 2, 0.5]},
    "lognormal": {"_type": "lognormal", "_value": [0, 1]},
    "qlognormal": {"_type": "qlognormal", "_value": [0, 1, 0.5]},
}
LINE = {"x": {"_type": "uniform", "_value": [-1, 1]}}


def make(space=LINE, **arguments):
    tuner = OptunaTuner(**({"sampler": "TPESampler", "seed": 0} | arguments))
    tuner.update_search_space(space)
    return tuner


def search(tuner, trials, function, at_a_time=2):
    """Give a tuner the results of so many trials, some at a time; return their parameters."""
    everything = []
    for first in range(0, trials, at_a_time):
        ids = range(first, min(first + at_a_time, trials))
        given = {id: tuner.generate_parameters(id) for id in ids}
        for id, values in given.items():
            tuner.receive_trial_result(id, values, function(values))
            tuner.trial_end(id, True)
        everything += given.values()
    return everything


def multiple(value, step):
    return math.isclose(value / step, round(value / step))


@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler", "RandomSampler"])
def test_every_kind_of_search_space(sampler):
    drawn = search(make(KINDS, sampler=sampler), 30, lambda values: values["uniform"])
    assert all(list(values) == list(KINDS) for values in drawn)
    columns = {key: [values[key] for values in drawn] for key in KINDS}
    assert set(map(repr, columns["names"])) <= {"'a'", "None", "True"}
    assert set(columns["sizes"]) <= {4, 16, 64}
    assert set(columns["randint"]) <= {-2, -1, 0, 1, 2}
    assert all(type(value) is int for value in columns["randint"])
    assert all(-1 <= value <= 2 for value in columns["uniform"])
    assert all(0 <= value <= 1 and multiple(value, 0.25) for value in columns["quniform"])
    assert all(0.001 <= value <= 0.1 for value in columns["loguniform"])
    assert all(
        1 <= value <= 100 and (value == 1 or multiple(value, 10))
        for value in columns["qloguniform"]
    )
    assert all(-2 < value < 12 for value in columns["normal"])
    assert all(multiple(value, 0.5) for value in columns["qnormal"] + columns["qlognormal"])
    assert all(0 < value < math.exp(3.5) for value in columns["lognormal"])
    assert all(len(set(map(repr, column))) > 1 for column in columns.values())


def test_numbers_to_choose_from_are_ordered_and_names_are_not():
    distributions = make(KINDS).space.distributions
    assert (distributions["sizes"].low, distributions["sizes"].high) == (0, 2)
    assert distributions["names"].choices == (0, 1, 2)
    values = search(make({"sizes": KINDS["sizes"]}), 40, lambda values: -values["sizes"])
    assert {given["sizes"] for given in values} == {4, 16, 64}
    assert sum(given["sizes"] == 4 for given in values) > 20


def test_a_nested_space_is_refused_in_a_line():
    nested = {"layer": {"_type": "choice", "_value": [{"_name": "none"}]}}
    with pytest.raises(ValueError, match=r"^layer is nested; allowed with Optuna: [^\n]*$"):
        make(nested)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"sampler": "BestSampler"}, "sampler is 'BestSampler'; allowed: .*TPESampler"),
        ({"sampler": "version"}, "sampler is 'version'; allowed"),
        ({"sampler_args": {"trials": 3}}, "unexpected keyword argument 'trials'"),
        ({"optimize_mode": "best"}, "minimize.*maximize"),
    ],
)
def test_arguments_that_optuna_lacks_are_refused(arguments, part):
    with pytest.raises((ValueError, TypeError), match=part):
        make(**arguments)


def test_a_seed_repeats_the_parameters():
    one, same, other = (
        search(make(KINDS, seed=seed), 12, lambda values: values["normal"]) for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize(("optimize_mode", "sign"), [("maximize", -1), ("minimize", 1)])
@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler"])
def test_it_learns(sampler, optimize_mode, sign):
    tuner = make(sampler=sampler, optimize_mode=optimize_mode)
    drawn = search(tuner, 30, lambda values: {"default": sign * (values["x"] - 0.3) ** 2})
    assert min(abs(values["x"] - 0.3) for values in drawn) < 0.05
    assert abs(tuner.study.best_params["x"] - 0.3) < 0.05


def test_trials_that_end_without_a_result_are_left_out():
    tuner = make()
    given = [tuner.generate_parameters(number) for number in range(4)]
    tuner.trial_end(0, False)
    tuner.receive_trial_result(1, given[1], 7.0)
    tuner.trial_end(1, True)
    with pytest.warns(UserWarning, match="nan is not acceptable"):
        tuner.receive_trial_result(2, given[2], float("nan"))
    tuner.trial_end(2, True)
    tuner.receive_trial_result(1, given[1], 8.0)  # a second one, which NNI lets through
    states = [trial.state.name for trial in tuner.study.trials]
    assert states == ["FAIL", "COMPLETE", "FAIL", "RUNNING"]
    assert tuner.study.best_params["x"] == given[1]["x"]
    assert tuner.study.best_value == 7.0


@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler"])
def test_results_of_before_come_back_in(sampler):
    first = make(KINDS, sampler=sampler)
    drawn = search(first, 12, lambda values: values["uniform"])
    records = [{"parameter": values, "value": values["uniform"]} for values in drawn]
    resumed = make(KINDS, sampler=sampler)
    resumed.import_data([*records, {"parameter": drawn[0], "value": float("nan")}])
    assert resumed.study.best_value == first.study.best_value
    for ours, theirs in zip(resumed.study.trials, first.study.trials, strict=True):
        assert ours.value == theirs.value
        assert ours.params["loguniform"] == pytest.approx(theirs.params["loguniform"])
        assert ours.params["names"] == theirs.params["names"]
    assert resumed.generate_parameters(12) not in drawn


def tuner_config(name, **arguments):
    return {
        "codeDirectory": str(ROOT),
        "className": f"nnisearch.tuners.{name}",
        "classArgs": arguments,
    }


def test_a_search_by_optuna_and_its_resumption(experiment):
    tuner = tuner_config("OptunaTuner", sampler="GPSampler", seed=0)
    demo = experiment("configs/demo.yml", SEARCH, tuner=tuner, searchSpace=SPACE, maxTrialNumber=6)
    before = demo.wait_for(lambda trials: sum("endTime" in trial for trial in trials) >= 2, 120)
    demo.nnictl("stop", demo.id)
    demo.resume()
    trials = demo.wait(120)
    succeeded = [trial for trial in trials if trial["status"] == "SUCCEEDED"]
    assert len(succeeded) >= 4
    assert all(accuracy(trial) > 5 for trial in succeeded)
    log = (demo.home / "nni-experiments" / demo.id / "log" / "dispatcher.log").read_text()
    assert "ERROR" not in log
    ended = {trial["trialJobId"] for trial in before if trial["status"] == "SUCCEEDED"}
    assert ended <= {trial["trialJobId"] for trial in succeeded}
    assert demo.stop() == []


def test_hyperband_gives_the_best_more_epochs(experiment):
    space = {key: SPACE[key] for key in ("batch_size", "lr", "momentum")}
    tuner = tuner_config("Hyperband", optimize_mode="maximize", R=2, eta=2)
    demo = experiment("configs/demo.yml", SEARCH, tuner=tuner, searchSpace=space, maxTrialNumber=5)
    trials = demo.wait(180)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    given = {trial["trialJobId"]: parameters(trial) for trial in trials}
    assert sorted(values["epochs"] for values in given.values()) == [1, 1, 2, 2, 2]
    short = [trial for trial in trials if given[trial["trialJobId"]]["epochs"] == 1]
    best = given[max(short, key=accuracy)["trialJobId"]]
    assert best | {"epochs": 2} in given.values()
    assert demo.stop() == []


def test_hyperband_takes_text_for_a_trials_id():
    assert Hyperband.is_created_in_previous_exp(None, "0-1_0_3") is False


@pytest.mark.parametrize("name", tuners.TUNERS)
def test_a_replayed_search_keeps_two_trials_running(name):
    space = json.loads((ROOT / "search_space.json").read_text())
    given = {key: entry["_value"][0] for key, entry in space.items()}
    row = {"hyperparameters": given, "test": 50.0, "seconds": 10.0}  # and all others are like it
    ended = tuners.search(name, 0, 95, tuners.Model([row] * 2), space)
    assert [round(seconds) for seconds, _ in ended] == [10 * (n // 2 + 1) for n in range(19)]
    assert tuners.best_so_far(ended, [5, 15]).tolist() == pytest.approx([10, 50])


def test_when_a_replayed_search_has_reached_a_goal():
    ended = [(10, 40), (11, 60), (12, 50), (13, 70)]
    assert tuners.best_so_far(ended, [9, 11, 12.5, 20]).tolist() == [10, 60, 60, 70]
    assert tuners.first(ended, 60) == (2, 11)
    assert tuners.first(ended, 71) == (math.inf, math.inf)
