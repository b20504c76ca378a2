"""Optuna's samplers as tuners of NNI.

A configuration names OptunaTuner by `codeDirectory` (any folder, if nnisearch is installed, or the
one that holds nnisearch/) and `className`. It supports what NNI expects of a tuner: concurrent and
failed trials, resuming, a search space that changes during the search, and all search spaces except
nested ones. The same seed gives the same parameters.
"""

import importlib.util
import logging
import os
import threading

import optuna
from nni import NoMoreTrialError
from nni.tuner import Tuner
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
        self.arguments = (sampler, sampler_args, seed, optimize_mode)
        self.study = optuna.create_study(direction=optimize_mode, sampler=self.make_sampler())
        self.study.stop = self.stop  # Optuna's own method only works in study.optimize()
        self.is_used_up = False
        self.space = None
        self.running = {}  # parameter ID: the number of its trial in the study

    def make_sampler(self, shift=0):
        """Return the sampler; shift is added to the seed."""
        sampler, arguments, seed, _ = self.arguments
        seed = None if seed is None else seed + shift
        return getattr(optuna.samplers, sampler)(seed=seed, **(arguments or {}))

    def make_anew(self):
        """Return this tuner without results. manager/fixes.py lets it search a changed space."""
        return OptunaTuner(*self.arguments)

    def stop(self):
        """Note that the sampler, such as BruteForceSampler, has tried all sets of parameters."""
        self.is_used_up = True

    def update_search_space(self, search_space):
        self.space = Space(search_space)

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
        data, reasons = list(data), []
        for record in data:
            try:
                self.add_result(record)
            except ValueError as error:
                reasons.append(error)
        if reasons:
            log.warning("%d of %d results left out: %s", len(reasons), len(data), reasons[0])
        # Otherwise a resumed search repeats its first trials.
        self.study.sampler = self.make_sampler(1 + len(self.study.get_trials(deepcopy=False)))

    def add_result(self, record):
        """Add one of import_data()'s results to the study. Raises ValueError if it does not fit."""
        if not isinstance(record, dict) or not {"parameter", "value"} <= record.keys():
            raise ValueError(f"{record!r}; allowed: an object of parameter and value")
        value = number(record["value"])
        if value is None:
            raise ValueError(f"value is {record['value']!r}; allowed: a number")
        params = self.space.params(record["parameter"])
        distributions = self.space.distributions
        self.study.add_trial(
            optuna.create_trial(value=value, params=params, distributions=distributions)
        )
