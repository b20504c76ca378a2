"""Converts NNI's search spaces into Optuna's distributions, and parameters in both directions."""

import math
from statistics import NormalDist

from nni.common.hpo_utils import deformat_parameters, format_search_space
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nnisearch.before.space import NUMBERS, check_space, is_nested, is_number


class Space:
    """A search space of NNI as Optuna's distributions, {name: distribution}.

    Raises ValueError for a nested space, and for one that check_space() refuses.
    """

    def __init__(self, search_space):
        check_space(search_space)
        if not search_space:
            raise ValueError("searchSpace is {}; allowed with Optuna: at least one parameter")
        entries = {key: prepare(key, entry) for key, entry in search_space.items()}
        self.specs = format_search_space(entries)
        self.distributions = {spec.name: distribution(spec) for spec in self.specs.values()}

    def values(self, params):
        """Convert Optuna's parameters into NNI's."""
        numbers = {key: from_optuna(spec, params[spec.name]) for key, spec in self.specs.items()}
        values = deformat_parameters(numbers, self.specs)
        for spec in self.specs.values():
            if spec.type == "loguniform":  # exp(log(0.1)) is greater than 0.1
                values[spec.name] = min(max(values[spec.name], spec.values[0]), spec.values[1])
        return values

    def params(self, values):
        """Convert NNI's parameters into Optuna's. Raises ValueError if they do not fit."""
        if not isinstance(values, dict):
            raise ValueError(f"parameter is {values!r}; allowed: an object")
        if missing := self.distributions.keys() - values.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        return {spec.name: to_optuna(spec, values[spec.name]) for spec in self.specs.values()}


def prepare(key, entry):
    """Return an entry of a search space, with numbers to choose from in their order.

    Raises ValueError for what Optuna refuses, unlike NNI's tuners.
    """
    kind, values = entry["_type"], entry["_value"]
    if kind == "choice":
        if is_nested(values):
            allowed = "values other than objects with a _name"
            raise ValueError(f"{key} is nested; allowed with Optuna: {allowed}")
        are_numbers = all(map(is_number, values))
        return {"_type": kind, "_value": sorted(values) if are_numbers else values}
    values = values[: NUMBERS[kind]]
    wrong = f"searchSpace: {key} is {values}; allowed with Optuna for {kind}"
    if not all(map(is_number, values)) or (kind == "randint" and any(x % 1 for x in values)):
        raise ValueError(f"{wrong}: {'integers' if kind == 'randint' else 'numbers'}")
    if "normal" in kind and values[1] <= 0:
        raise ValueError(f"{wrong}: a deviation above 0")
    if "normal" not in kind and values[0] == values[1]:
        raise ValueError(f"{wrong}: two different bounds")
    if kind.startswith("q") and values[2] < 0:
        raise ValueError(f"{wrong}: a step above 0")
    return {"_type": kind, "_value": values}


def distribution(spec):
    """Return Optuna's distribution for NNI's specification of a parameter.

    A choice of numbers becomes an integer distribution: its order helps the sampler.
    """
    if spec.type == "choice" and not all(map(is_number, spec.values)):
        return CategoricalDistribution(range(spec.size))
    if spec.categorical:
        return IntDistribution(0, spec.size - 1)
    if spec.normal_distributed:
        return FloatDistribution(0.001, 0.999)  # quantiles
    return FloatDistribution(spec.low, spec.high)  # logarithms for loguniform and qloguniform


def from_optuna(spec, x):
    """Convert Optuna's number into NNI's internal one."""
    return NormalDist(spec.mu, spec.sigma).inv_cdf(x) if spec.normal_distributed else x


def to_optuna(spec, value):
    """Convert a trial's value into Optuna's number, within the bounds of distribution().

    Raises ValueError for a value outside the specification.
    """
    wrong = ValueError(f"{spec.name} is {value!r}; allowed: {spec.type} {spec.values}")
    if spec.type == "choice":
        for index, option in enumerate(spec.values):
            if option == value and isinstance(option, bool) == isinstance(value, bool):
                return index
        raise wrong
    if not is_number(value):
        raise wrong
    if spec.type == "randint":
        index = value - spec.values[0]
        if index != int(index) or not 0 <= index < spec.size:
            raise wrong
        return int(index)
    low, high = spec.low, spec.high
    if spec.normal_distributed:
        low, high = from_optuna(spec, 0.001), from_optuna(spec, 0.999)
    ends = (math.exp(low), math.exp(high)) if spec.log_distributed else (low, high)
    rounding = (spec.q or 0) / 2 + 1e-9 * max(map(abs, ends))
    if not ends[0] - rounding <= value <= ends[1] + rounding:
        raise wrong
    if spec.log_distributed:
        value = math.log(value or spec.q / 4)  # rounding to a step may have given 0
    value = min(max(value, low), high)
    return NormalDist(spec.mu, spec.sigma).cdf(value) if spec.normal_distributed else value
