"""Adds tuners to NNI: Optuna's samplers, and a Hyperband that works.

A configuration names one by `codeDirectory` (the folder that holds nnisearch/) and `className`.
OptunaTuner supports what NNI expects of a tuner: concurrent and failed trials, resuming, a search
space that changes during the search, and all search spaces except nested ones. The same seed gives
the same parameters.
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
from nnisearch.results.trials import number

log = logging.getLogger("nni.tuners")  # the logger nni writes to dispatcher.log
# The package that a sampler imports after its first, random trials.
PACKAGES = {"GPSampler": "torch", "CmaEsSampler": "cmaes"}


class OptunaTuner(Tuner):
    """A tuner of NNI that uses the sampler with this name in optuna.samplers.

    sampler_args are the sampler's arguments; optimize_mode is maximize or minimize. Raises
    ValueError or TypeError for names and arguments that Optuna does not have.
    """

    def __init__(self, sampler, sampler_args=None, seed=None, optimize_mode="maximize"):
        if sampler not in optuna.samplers.__all__ or not sampler.endswith("Sampler"):
            names = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
            raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(names)}")
        # Otherwise GPSampler's threads wait for the trials' threads. torch reads this on import.
        os.environ["OMP_NUM_THREADS"] = "1"
        if package := PACKAGES.get(sampler):
            if importlib.util.find_spec(package) is None:
                needed = f"pip install {package}, which it needs"
                raise ValueError(f"sampler is {sampler!r}; allowed: after {needed}")
            # The import takes seconds: it happens while the first, random trials run.
            importing = threading.Timer(5, importlib.import_module, [package])
            importing.daemon = True
            importing.start()
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
        """Return a study without trials."""
        study = optuna.create_study(
            direction=self.optimize_mode, sampler=self.make_sampler(seed=seed)
        )
        self.is_used_up = False
        study.stop = self.stop  # Optuna's own method only works in study.optimize()
        return study

    def stop(self):
        """Note that the sampler, such as BruteForceSampler, has tried all sets of parameters."""
        self.is_used_up = True

    def update_search_space(self, search_space):
        """Search this space from now on, and keep the results that fit it.

        Raises ValueError if the first space cannot be searched. A later one must not end the
        search: it is ignored, with a line in dispatcher.log.
        """
        try:
            space = Space(search_space)
        except ValueError as error:
            if self.space is None:
                raise
            log.error("the new search space is refused, the old one stays: %s", error)
            return
        before, self.space = self.space, space
        if before is None:
            return
        # A new study: samplers remember the old space, and studies refuse changed choices.
        trials = self.study.get_trials(deepcopy=False)
        seed = None if self.seed is None else self.seed + len(trials)  # do not repeat the draws
        self.study = self.make_study(seed)
        self.add_results(
            {"parameter": before.values(trial.params), "value": trial.value}
            for trial in trials
            if trial.state == TrialState.COMPLETE
        )
        running, self.running = self.running, {}
        for id, order in running.items():
            with contextlib.suppress(ValueError):  # it does not fit, so its result will not count
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
        # otherwise it is a second result, or one after the trial's end, which nnictl passes on

    def trial_end(self, parameter_id, success, **_):
        if parameter_id in self.running:  # it has reported nothing
            self.study.tell(self.running.pop(parameter_id), state=TrialState.FAIL)

    def import_data(self, data):
        """Learn from results, a list of {"parameter": {name: value}, "value": result}."""
        self.add_results(data)
        self.study.sampler.reseed_rng()  # otherwise a resumed search repeats its first trials

    def add(self, values, value=None):
        """Add a trial with NNI's parameters to the study: a running one if it has no value.

        Raises ValueError if the parameters do not fit the search space.
        """
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        params, distributions = self.space.params(values), self.space.distributions
        self.study.add_trial(
            optuna.create_trial(
                state=state, params=params, distributions=distributions, value=value
            )
        )

    def add_results(self, records):
        """Add results to the study, in import_data()'s form; log how many are left out."""
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
    """NNI's Hyperband without its faults. A trial's budget is a number of epochs from 1 to R.

    budget names the parameter that holds a trial's budget; trials written for NNI's own Hyperband
    call it TRIAL_BUDGET. optimize_mode, R, eta and exec_mode are NNI's.

    NNI's own fails at the first result, because it compares IDs, which are text, with a number
    (https://github.com/microsoft/nni/issues/5263). It also fails at the end of a round if too many
    trials have reported nothing.
    """

    def __init__(self, budget="epochs", **arguments):
        hyperband_advisor._KEY = budget  # a global of NNI's; the tuner's process has one tuner
        super().__init__(**arguments)
        self.outside = {None}  # IDs of trials outside all brackets; None: the user's own trials

    def handle_add_customized_trial(self, data):
        """Note the trials that a resumed search runs again, whose brackets are lost.

        New brackets get higher numbers, so that no ID occurs twice.
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
