"""nnisearch/tuners.py: Optuna's samplers, as NNI calls them and in a real search."""

import contextlib
import logging
import math
import sqlite3
import subprocess
import sys
import time

import nni
import pytest
from conftest import ROOT
from experiment import accuracy, parameters

from nnisearch.manager import fixes
from nnisearch.tuners import PACKAGES, OptunaTuner

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


def near_0_3(values):
    return -((values["x"] - 0.3) ** 2)


def multiple(value, step):
    return math.isclose(value / step, round(value / step))


@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler", "RandomSampler"])
def test_every_kind_of_search_space(sampler):
    drawn = search(make(KINDS, sampler=sampler), 16, lambda values: values["uniform"])
    assert all(list(values) == list(KINDS) for values in drawn)
    columns = {key: [values[key] for values in drawn] for key in KINDS}
    assert set(map(repr, columns["names"])) <= {"'a'", "None", "True"}
    assert set(columns["sizes"]) <= {4, 16, 64}
    assert set(columns["randint"]) <= {-2, -1, 0, 1, 2}
    assert all(type(value) is int for value in columns["randint"])
    assert all(-1 <= value <= 2 for value in columns["uniform"])
    assert all(0 <= value <= 1 and multiple(value, 0.25) for value in columns["quniform"])
    assert all(0.001 <= value <= 0.1 for value in columns["loguniform"])
    tens = columns["qloguniform"]
    assert all(1 <= value <= 100 and (value == 1 or multiple(value, 10)) for value in tens)
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


def test_a_seed_repeats_the_parameters_also_of_a_resumed_search():
    def drawn(seed):
        first = search(make(KINDS, seed=seed), 12, lambda values: values["normal"])
        resumed = make(KINDS, seed=seed)
        resumed.import_data([{"parameter": values, "value": 1} for values in first])
        return first + search(resumed, 6, lambda values: values["normal"])

    one, same, other = map(drawn, (1, 1, 2))
    assert one == same
    assert len(set(map(str, one + other))) == 36


@pytest.mark.parametrize(("optimize_mode", "sign"), [("maximize", -1), ("minimize", 1)])
@pytest.mark.parametrize(("sampler", "trials"), [("TPESampler", 30), ("GPSampler", 16)])
def test_the_sampler_learns(sampler, trials, optimize_mode, sign):
    tuner = make(sampler=sampler, optimize_mode=optimize_mode)
    drawn = search(tuner, trials, lambda values: {"default": sign * (values["x"] - 0.3) ** 2})
    assert min(abs(values["x"] - 0.3) for values in drawn) < 0.05
    assert abs(tuner.study.best_params["x"] - 0.3) < 0.05


def test_trials_that_end_without_a_result_are_left_out():
    tuner = make()
    given = [tuner.generate_parameters(number) for number in range(4)]
    tuner.trial_end(0, False)
    tuner.receive_trial_result(1, given[1], 7.0)
    tuner.trial_end(1, True)
    tuner.receive_trial_result(2, given[2], float("nan"))
    tuner.trial_end(2, True)
    tuner.receive_trial_result(1, given[1], 8.0)  # a second one, which NNI lets through
    tuner.generate_parameters(4)
    states = [trial.state.name for trial in tuner.study.trials]
    assert states == ["FAIL", "COMPLETE", "FAIL", "RUNNING", "RUNNING"]
    assert tuner.study.best_params["x"] == given[1]["x"]
    assert tuner.study.best_value == 7.0


@pytest.mark.parametrize("value", ["good", None, {"loss": 1}, [1], 10**400, math.nan, math.inf])
def test_a_result_that_is_no_number_is_a_failure(value):
    tuner = make()
    tuner.receive_trial_result(0, tuner.generate_parameters(0), value)
    assert [trial.state.name for trial in tuner.study.trials] == ["FAIL"]


CHOICES = [
    [[1, 2], [3], []],
    [{"a": 1}, {"a": [2]}, {}],
    [{"_name": "a", "x": 1}, "b", None],  # NNI takes it for nested only if all have a _name
    [None, True, 1, 0.5, "1"],
    [True, False],
    [3, 1, 3, 2.5],
    [10**400, 1],
    ["one"],
]


@pytest.mark.parametrize("values", CHOICES, ids=lambda values: repr(values)[:30])
@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler"])
def test_a_choice_may_be_of_anything(sampler, values):
    space = LINE | {"what": {"_type": "choice", "_value": values}}
    tuner = make(space, sampler=sampler)
    drawn = search(tuner, 12, lambda given: given["x"])
    assert all(any(given["what"] is value for value in values) for given in drawn)
    resumed = make(space, sampler=sampler)
    resumed.import_data([{"parameter": given, "value": given["x"]} for given in drawn])
    chosen = [resumed.space.values(trial.params)["what"] for trial in resumed.study.trials]
    assert list(map(repr, chosen)) == [repr(given["what"]) for given in drawn]


@pytest.mark.parametrize(
    ("kind", "values", "part"),
    [
        ("uniform", [1, 0], "the lower bound first"),  # as check_space() says it
        ("uniform", ["1e-4", 1], "allowed with Optuna for uniform: numbers"),
        ("uniform", [0, 10**400], "finite numbers"),
        ("qnormal", [0, 1, -1], "a step above 0"),
        ("normal", [0, 0], "a deviation above 0"),
        ("randint", [0, 1.5], "integers"),
        ("randint", [3, 3], "two different bounds"),
        ("choice", [{"_name": "none"}], "^rate is nested; allowed with Optuna: "),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_a_line(kind, values, part):
    with pytest.raises(ValueError, match=part) as error:
        make({"rate": {"_type": kind, "_value": values}})
    assert "rate" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space", [{}, None, {"x": {"_type": "uniform"}}])
def test_a_search_space_of_a_wrong_form_is_refused_in_a_line(space):
    with pytest.raises(ValueError, match=r"^searchSpace[^\n]*$"):
        make(space)


@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler", "RandomSampler"])
def test_a_space_that_changes_keeps_the_results_that_fit_it(sampler, monkeypatch, tmp_path):
    monkeypatch.setenv("NNI_LOG_DIRECTORY", str(tmp_path))
    space = LINE | {"size": {"_type": "choice", "_value": [1, 2, 4]}}
    dispatcher = fixes.Dispatcher("ws://_unittest_", make(space, sampler=sampler))
    drawn = search(dispatcher.tuner, 14, near_0_3)
    dispatcher.learn([{"parameter": values, "value": near_0_3(values)} for values in drawn])
    x = {"_type": "uniform", "_value": [-0.5, 1]}
    new = {"x": x, "size": {"_type": "choice", "_value": ["4", 2, 1]}}
    dispatcher.handle_update_search_space(new)
    tuner = dispatcher.tuner
    kept = [values for values in drawn if values["size"] != 4 and values["x"] >= -0.5]
    assert 0 < len(kept) < 14
    assert [tuner.space.values(trial.params) for trial in tuner.study.trials] == kept
    assert [trial.value for trial in tuner.study.trials] == list(map(near_0_3, kept))
    later = search(tuner, 8, near_0_3)
    assert {values["size"] for values in later} <= {"4", 2, 1}
    assert not [values for values in later if values in drawn]
    dispatcher.send = lambda *_: None
    dispatcher.handle_update_search_space({"x": {"_type": "quniform", "_value": [0, 1, 0]}})
    assert "searchSpace: x is [0, 1, 0]" in (tmp_path / "notices.log").read_text()
    assert dispatcher.tuner is tuner


@pytest.mark.parametrize("sampler", ["BruteForceSampler", "GridSampler"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_that_has_tried_everything_ends_the_search(sampler):
    space = {"size": {"_type": "choice", "_value": [1, 2, 4]}}
    arguments = {"GridSampler": {"search_space": {"size": [0, 1, 2]}}}
    tuner = make(space, sampler=sampler, sampler_args=arguments.get(sampler))
    drawn = search(tuner, 3, lambda values: values["size"], at_a_time=1)
    assert sorted(values["size"] for values in drawn) == [1, 2, 4]
    with pytest.raises(nni.NoMoreTrialError):
        tuner.generate_parameters(3)
    assert tuner.generate_multiple_parameters([3, 4]) == []


@pytest.mark.parametrize("sampler", ["TPESampler", "GPSampler"])
def test_earlier_results_are_imported(sampler):
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


FITS = {"size": 1, "rate": 0.1}
FOREIGN = [
    {"parameter": {"size": 1}, "value": 1},
    *({"parameter": FITS | {"size": size}, "value": 1} for size in (3, True, "1", [1])),
    *({"parameter": FITS | {"rate": rate}, "value": 1} for rate in (0.5, 0, "0.1", None)),
    *({"parameter": FITS | {"rate": rate}, "value": 1} for rate in ([0.1], math.nan)),
    *({"parameter": FITS, "value": value} for value in ("good", None, {"loss": 1}, 10**400)),
    *({"parameter": given, "value": 1} for given in ("size 1", None)),
    {"value": 1},
    {"parameter": FITS},
    "size 1",
    None,
]
FITTING = [
    {"parameter": FITS, "value": 0.25},
    {"parameter": {"size": 2.0, "rate": 0.01, "more": 1}, "value": {"default": 0.5}},
]


def test_imported_results_that_do_not_fit_are_left_out_and_counted(caplog):
    space = {
        "size": {"_type": "choice", "_value": [1, 2, 4]},
        "rate": {"_type": "loguniform", "_value": [0.001, 0.1]},
    }
    tuner = make(space)
    with caplog.at_level(logging.WARNING, logger="nni"):
        fixes.Dispatcher("ws://_unittest_", tuner).handle_import_data([*FOREIGN, *FITTING])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{len(FOREIGN)} of {len(FOREIGN) + 2} results left out: rate is missing"
    assert [trial.value for trial in tuner.study.trials] == [0.25, 0.5]


def test_values_that_a_step_has_rounded_fit():
    tuner = make(KINDS)
    rounded = {"quniform": 1, "qloguniform": 1, "qnormal": -1, "qlognormal": 0}
    given = tuner.generate_parameters(0) | rounded
    tuner.import_data([{"parameter": given, "value": 1}])
    assert tuner.space.values(tuner.study.trials[-1].params) == pytest.approx(given)


THINK = """
import sys
from nnisearch.tuners import OptunaTuner
for sampler in ("RandomSampler", "TPESampler", "GPSampler"):
    few = {} if sampler == "RandomSampler" else {"n_startup_trials": 2}
    tuner = OptunaTuner(sampler, few)
    tuner.update_search_space({"x": {"_type": "uniform", "_value": [0, 1]}})
    for number in range(3):
        values = tuner.generate_parameters(number)
        tuner.receive_trial_result(number, values, values["x"])
    print(sys.modules["torch"].get_num_threads() if "torch" in sys.modules else "no torch")
"""


def test_gp_sampler_has_one_thread_and_other_samplers_no_torch(environment):
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-W", "error", "-c", THINK]
    thought = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert thought.stderr == ""  # where Optuna would say that it misses greenlet
    assert thought.stdout.splitlines() == ["no torch", "no torch", "1"]


@pytest.mark.parametrize("sampler", ["GPSampler", "CmaEsSampler"])
def test_a_sampler_whose_package_is_missing_is_refused(monkeypatch, sampler):
    """Optuna would miss it when the first trials have ended."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    allowed = f"sampler is '{sampler}'; .*: after pip install {PACKAGES[sampler]}"
    with pytest.raises(ValueError, match=allowed):
        OptunaTuner(sampler)


SUM_IS_THE_RESULT = "sleep 0.5; python3 tests/support/other_project.py"


def test_a_search_that_is_changed_from_outside_and_resumed(experiment):
    tuner = {"className": "nnisearch.tuners.OptunaTuner", "codeDirectory": str(ROOT)}
    tuner["classArgs"] = {"sampler": "TPESampler", "seed": 0}
    space = LINE | {"kind": {"_type": "choice", "_value": ["a", "b"]}}
    changes = {"trialCommand": SUM_IS_THE_RESULT, "searchSpace": space, "maxTrialNumber": 99}
    search = experiment("configs/demo.yml", tuner=tuner, **changes)

    def change(what, **params):  # as nnictl update does
        profile = search.get("experiment")
        profile["params"] |= params
        search.request("PUT", f"experiment?update_type={what}", profile)

    search.wait_for(lambda trials: sum("endTime" in trial for trial in trials) >= 3, 60)
    change("SEARCH_SPACE", searchSpace=space | {"kind": KINDS["names"]})
    foreign = [{"parameter": {"x": 0}, "value": 1}, {"parameter": {"x": 0, "kind": True}}]
    foreign += [{"parameter": {"x": 0, "kind": True}, "value": "good"}]
    fitting = {"parameter": {"x": 0, "kind": None}, "value": 1}
    search.request("POST", "experiment/import-data", [*foreign, fitting])
    search.wait_for(lambda trials: {parameters(t)["kind"] for t in trials} >= {True, None}, 90)

    search.request("POST", "trial-jobs", {"x": 0.5})  # Customized trial in the Web UI
    own = {"SUCCEEDED": {"x": 0.5}}
    search.wait_for(lambda trials: own in [{t["status"]: parameters(t)} for t in trials], 60)
    database = search.home / "nni-experiments" / search.id / "db" / "nni.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM MetricData").fetchone()
        time.sleep(3)  # NNI gives up after one
    change("MAX_TRIAL_NUM", maxTrialNumber=1)
    before = search.wait(60)
    assert search.stop() == []
    search.resume()
    change("MAX_TRIAL_NUM", maxTrialNumber=99)
    trials = search.wait_for(lambda trials: len(trials) > len(before) + 2, 60)
    assert search.get("check-status") == {"status": "RUNNING", "errors": []}
    log = (search.home / "nni-experiments" / search.id / "log" / "dispatcher.log").read_text()
    assert "ERROR" not in log
    assert "3 of 4 results left out: kind is missing" in log
    results = {t["trialJobId"]: accuracy(t) for t in trials if t["status"] == "SUCCEEDED"}
    assert {t["trialJobId"]: accuracy(t) for t in before}.items() <= results.items()
    assert search.stop() == []
