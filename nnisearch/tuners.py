"""Tuners that NNI lacks: Optuna's samplers, and NNI's Hyperband, mended.

A configuration names one by `codeDirectory` (the folder that holds nnisearch/) and `className`.
OptunaTuner promises what NNI expects of a tuner: trials at the same time, trials that fail,
resuming, a search space that is changed under way, and every kind of search space but nested ones.
The same seed gives the same parameters.
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import threading

import optuna
from nni import NoMoreTrialError
from nni.algorithms.hpo import hyperband_advisor
from nni.tuner import Tuner
from nni.utils import OptimizeMode
from optuna.trial import TrialState

from nnisearch.optuna_space import Space
from nnisearch.shared.results import number

log = logging.getLogger("nni.tuners")  # below nni, whose lines reach dispatcher.log
# What Optuna's samplers import when they first think, which is after the first trials.
PACKAGES = {"GPSampler": "torch", "CmaEsSampler": "cmaes"}


class OptunaTuner(Tuner):
    """One of Optuna's samplers, by its name in optuna.samplers, as a tuner of NNI.

    sampler_args are the sampler's own, optimize_mode is maximize or minimize. Raises ValueError or
    TypeError for what Optuna does not have.
    """

    def __init__(self, sampler, sampler_args=None, seed=None, optimize_mode="maximize"):
        if sampler not in optuna.samplers.__all__ or not sampler.endswith("Sampler"):
            names = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
            raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(names)}")
        # GPSampler's threads would wait for those of the trials. torch reads this when imported.
        os.environ["OMP_NUM_THREADS"] = "1"
        if package := PACKAGES.get(sampler):
            if importlib.util.find_spec(package) is None:
                needed = f"pip install {package}, which it needs"
                raise ValueError(f"sampler is {sampler!r}; allowed: after {needed}")
            # The import takes seconds, in which no trial would run. So it is done under the first
            # trials, which are drawn at random, once they have started.
            meanwhile = threading.Timer(5, importlib.import_module, [package])
            meanwhile.daemon = True
            meanwhile.start()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.seed = seed
        self.make_sampler = functools.partial(
            getattr(optuna.samplers, sampler), **(sampler_args or {})
        )
        self.optimize_mode = optimize_mode
        self.study = self.make_study(seed)
        self.space = None
        self.running = {}  # parameter ID: the number of its trial in the study

    def make_study(self, seed):
        """Return a study without trials, whose sampler has seen none."""
        study = optuna.create_study(
            direction=self.optimize_mode, sampler=self.make_sampler(seed=seed)
        )
        self.is_used_up = False
        study.stop = self.stop  # Optuna's refuses outside of its own loop
        return study

    def stop(self):
        """Note that a sampler, such as BruteForceSampler, has tried all that there is."""
        self.is_used_up = True

    def update_search_space(self, search_space):
        """Search a space from now on, with what of the results so far fits it.

        Raises ValueError for a first space that cannot be searched. A later one is left out, with
        a line in dispatcher.log: it should not end a search that goes well.
        """
        try:
            space = Space(search_space)
        except ValueError as error:
            if self.space is None:
                raise
            log.error("the new search space is not taken, the old one stays: %s", error)
            return
        former, before, self.space = self.study, self.space, space
        if before is None:
            return
        # Samplers keep the space that they have seen, and studies refuse a choice of other values.
        trials = former.get_trials(deepcopy=False)
        seed = None if self.seed is None else self.seed + len(trials)  # not the first draws again
        self.study = self.make_study(seed)
        self.add_results(
            {"parameter": before.values(trial.params), "value": trial.value}
            for trial in trials
            if trial.state == TrialState.COMPLETE
        )
        running, self.running = self.running, {}
        for id, order in running.items():
            with contextlib.suppress(ValueError):  # it runs on, but its result will not fit
                self.add(before.values(trials[order].params))
                self.running[id] = len(self.study.get_trials(deepcopy=False)) - 1

    def generate_parameters(self, parameter_id, **_):
        if self.is_used_up:
            raise NoMoreTrialError
        trial = self.study.ask(self.space.distributions)
        self.running[parameter_id] = trial.number
        return self.space.values(trial.params)

    def receive_trial_result(self, parameter_id, parameters, value, **_):
        if parameter_id in self.running:
            value = number(value)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self.study.tell(self.running.pop(parameter_id), value, state)
        # else it is a result after the end, or a second one, which nnictl lets through

    def trial_end(self, parameter_id, success, **_):
        if parameter_id in self.running:  # it has reported nothing
            self.study.tell(self.running.pop(parameter_id), state=TrialState.FAIL)

    def import_data(self, data):
        """Learn from results, a list of {"parameter": {name: value}, "value": result}."""
        self.add_results(data)
        self.study.sampler.reseed_rng()  # else a resumed search would repeat its first trials

    def add(self, values, value=None):
        """Add a trial with NNI's parameters to the study, one under way if it has no value.

        Raises ValueError if they are not of the search space.
        """
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        params, distributions = self.space.params(values), self.space.distributions
        self.study.add_trial(
            optuna.create_trial(
                state=state, params=params, distributions=distributions, value=value
            )
        )

    def add_results(self, records):
        """Add results, as import_data() takes them, to the study; log how many are left out."""
        records = list(records)
        reasons = []
        for record in records:
            try:
                if not isinstance(record, dict) or not {"parameter", "value"} <= record.keys():
                    raise ValueError(f"{record!r}; allowed: an object of parameter and value")
                value = number(record["value"])
                if value is None:
                    raise ValueError(f"value is {record['value']!r}; allowed: a number")
                self.add(record["parameter"], value)
            except ValueError as error:
                reasons.append(error)
        if reasons:
            log.warning("%d of %d results left out: %s", len(reasons), len(records), reasons[0])


class Hyperband(hyperband_advisor.Hyperband):
    """NNI's Hyperband, whose budget is the trial's epochs; R is the most, 1 the least.

    budget is the name by which a trial is given its budget among its parameters; a trial written
    for NNI's own Hyperband calls it TRIAL_BUDGET. optimize_mode, R, eta and exec_mode are NNI's.

    As shipped it ends at its first result, because NNI compares its IDs, which are text, with a
    number (https://github.com/microsoft/nni/issues/5263), and at the end of a round in which too
    many trials have reported nothing.
    """

    def __init__(self, budget="epochs", **arguments):
        hyperband_advisor._KEY = budget  # a global of NNI's; the tuner's process holds one tuner
        super().__init__(**arguments)
        self.outside = {None}  # IDs of trials of no bracket here; None: the user's own

    def handle_add_customized_trial(self, data):
        """Note the trials that a resumed search runs again: the brackets that they are of are lost.

        New brackets begin above theirs, so that no ID comes twice.
        """
        self.outside |= {trial["parameter_id"] for trial in data}
        numbers = [int(id.split("-")[0]) for id in self.outside - {None}]
        self.curr_hb = max(numbers, default=-1) + 1

    def is_created_in_previous_exp(self, param_id):
        return param_id in self.outside

    def _handle_trial_end(self, parameter_id):
        bracket_id, round, _ = parameter_id.split("_")
        worst = -math.inf if self.optimize_mode is OptimizeMode.Maximize else math.inf
        self.brackets[bracket_id].configs_perf[int(round)].setdefault(parameter_id, [-1, worst])
        super()._handle_trial_end(parameter_id)
