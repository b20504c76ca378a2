"""Tuners that NNI lacks: Optuna's samplers, and NNI's Hyperband, mended.

A configuration names one by `codeDirectory` (this folder) and `className`. OptunaTuner promises
what NNI expects of a tuner: trials at the same time, trials that fail, resuming, and every kind of
search space but nested ones. The same seed gives the same parameters.
"""

import math
from statistics import NormalDist

import optuna
from nni.algorithms.hpo import hyperband_advisor
from nni.common.hpo_utils import deformat_parameters, format_parameters, format_search_space
from nni.tuner import Tuner
from nni.utils import extract_scalar_reward
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution


def is_ordered(values):
    """Return whether the values of a choice are numbers, whose order tells something."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


class OptunaTuner(Tuner):
    """One of Optuna's samplers, by its name in optuna.samplers, as a tuner of NNI.

    sampler_args are the sampler's own, optimize_mode is maximize or minimize. Raises ValueError or
    TypeError for what Optuna does not have.
    """

    def __init__(self, sampler, sampler_args=None, seed=None, optimize_mode="maximize"):
        if sampler not in optuna.samplers.__all__ or not sampler.endswith("Sampler"):
            names = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
            raise ValueError(f"sampler is {sampler!r}; allowed: {', '.join(names)}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = getattr(optuna.samplers, sampler)(seed=seed, **(sampler_args or {}))
        self.study = optuna.create_study(direction=optimize_mode, sampler=sampler)
        self.running = {}

    def update_search_space(self, search_space):
        for key, entry in search_space.items():
            if entry["_type"] == "choice" and any(isinstance(v, dict) for v in entry["_value"]):
                allowed = "values that are no objects"
                raise ValueError(f"{key} is nested; allowed with Optuna: {allowed}")
            if entry["_type"] == "choice" and is_ordered(entry["_value"]):
                search_space = search_space | {key: entry | {"_value": sorted(entry["_value"])}}
        self.space = format_search_space(search_space)
        self.distributions = {spec.name: distribution(spec) for spec in self.space.values()}

    def generate_parameters(self, parameter_id, **_):
        trial = self.running[parameter_id] = self.study.ask(self.distributions)
        numbers = {
            key: from_optuna(spec, trial.params[spec.name]) for key, spec in self.space.items()
        }
        values = deformat_parameters(numbers, self.space)
        for spec in self.space.values():
            if spec.type == "loguniform":  # exp(log(0.1)) is above 0.1
                values[spec.name] = min(max(values[spec.name], spec.values[0]), spec.values[1])
        return values

    def receive_trial_result(self, parameter_id, parameters, value, **_):
        self.tell(parameter_id, values=extract_scalar_reward(value))

    def trial_end(self, parameter_id, success, **_):
        self.tell(parameter_id, state=optuna.trial.TrialState.FAIL)  # it has ended without a result

    def tell(self, parameter_id, **result):
        """Give the study a trial's first result or end; NNI may come with more of them."""
        if trial := self.running.pop(parameter_id, None):
            self.study.tell(trial, **result)

    def import_data(self, data):
        for record in data:
            value = extract_scalar_reward(record["value"])
            if math.isnan(value):  # which tell() takes for a failure, and create_trial() refuses
                continue
            values = dict(record["parameter"])
            for spec in self.space.values():
                if spec.log_distributed and values[spec.name] == 0:  # as q has rounded it
                    values[spec.name] = spec.q / 4
            numbers = format_parameters(values, self.space)
            params = {key[0]: to_optuna(self.space[key], x) for key, x in numbers.items()}
            distributions = self.distributions
            trial = optuna.create_trial(params=params, distributions=distributions, value=value)
            self.study.add_trial(trial)
        self.study.sampler.reseed_rng()  # else a resumed search would repeat its first trials


def distribution(spec):
    """Return Optuna's distribution for NNI's specification of a parameter."""
    if spec.type == "choice" and not is_ordered(spec.values):
        return CategoricalDistribution(range(spec.size))
    if spec.categorical:
        return IntDistribution(0, spec.size - 1)
    if spec.normal_distributed:  # by its quantile
        return FloatDistribution(0.001, 0.999)
    return FloatDistribution(spec.low, spec.high)  # of the logarithm, where NNI says so


def from_optuna(spec, x):
    """Return NNI's internal number for Optuna's."""
    return NormalDist(spec.mu, spec.sigma).inv_cdf(x) if spec.normal_distributed else x


def to_optuna(spec, x):
    """Return Optuna's number for NNI's internal one, within the bounds of distribution()."""
    if spec.normal_distributed:
        return min(max(NormalDist(spec.mu, spec.sigma).cdf(x), 0.001), 0.999)
    return x if spec.categorical else min(max(x, spec.low), spec.high)


class Hyperband(hyperband_advisor.Hyperband):
    """NNI's Hyperband, whose budget is the trial's epochs; R is the most, 1 the least.

    As shipped it calls the budget TRIAL_BUDGET, and ends at its first result, because NNI compares
    its IDs, which are text, with a number (https://github.com/microsoft/nni/issues/5263).
    """

    def __init__(self, **arguments):
        hyperband_advisor._KEY = "epochs"
        super().__init__(**arguments)

    def is_created_in_previous_exp(self, param_id):
        return False
