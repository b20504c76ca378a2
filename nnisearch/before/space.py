"""Checks a search space for mistakes that NNI's tuners ignore."""

import math
import re

from nnisearch.results.trials import finite
from nnisearch.shared.text import one_line

# {_type: the number of values in _value}
NUMBERS = {"uniform": 2, "randint": 2, "loguniform": 2, "normal": 2, "lognormal": 2}
NUMBERS |= {"quniform": 3, "qloguniform": 3, "qnormal": 3, "qlognormal": 3}


def check_space(space, where="searchSpace"):
    """Raise ValueError for mistakes in a search space, and in the spaces nested in it.

    where names the space in the message.
    """
    if not isinstance(space, dict):
        raise ValueError(f"{where} is {one_line(space)}; allowed: an object of parameters")
    for key, entry in space.items():
        at = f"{where}: {one_line(key)}"
        if not isinstance(entry, dict) or not {"_type", "_value"} <= entry.keys():
            raise ValueError(f"{at} is {one_line(entry)}; allowed: an object of _type and _value")
        kind, values = entry["_type"], entry["_value"]
        if kind == "choice":
            check_choice(values, at)
        elif kind in NUMBERS:
            check_numbers(kind, values, at)
        else:
            kinds = ", ".join(["choice", *NUMBERS])
            raise ValueError(f"{at}: _type is {one_line(kind)}; allowed: {kinds}")


def check_choice(values, at):
    """Check the values of a choice: any JSON, or objects with a _name and parameters."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{at} is {one_line(values)}; allowed: a list of at least one value")
    if any(isinstance(value, float) and finite(value) is None for value in values):
        raise ValueError(f"{at} is {one_line(values)}; allowed: finite numbers")
    for space, where in nested_spaces(values, at):
        check_space(space, where)


def check_numbers(kind, values, at):
    """Check the bounds, or the mean and deviation, and the step of a numeric parameter."""
    wrong = f"{at} is {one_line(values)}; allowed for {kind}"
    if not isinstance(values, list) or len(values) < NUMBERS[kind]:
        raise ValueError(f"{wrong}: a list of {NUMBERS[kind]} numbers")
    try:
        numbers = list(map(float, values[: NUMBERS[kind]]))  # NNI converts text, too
    except (TypeError, ValueError):
        raise ValueError(f"{wrong}: numbers") from None
    except OverflowError:  # an integer of more than 308 digits
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{wrong}: finite numbers")
    if "normal" not in kind:
        if numbers[0] > numbers[1]:
            raise ValueError(f"{wrong}: the lower bound first")
        if "log" in kind and numbers[0] <= 0:
            raise ValueError(f"{wrong}: a lower bound above 0")
    if kind.startswith("q") and numbers[2] == 0:
        raise ValueError(f"{wrong}: a step that is not 0 as the third")


def is_nested(values):
    """Return whether NNI reads the values of a choice as named search spaces."""
    return all(isinstance(value, dict) and "_name" in value for value in values)


def nested_spaces(values, at):
    """Yield (search space, where it is) for each value of a nested choice."""
    for value in values if is_nested(values) else []:
        space = {key: entry for key, entry in value.items() if key != "_name"}
        yield space, f"{at}: {one_line(value['_name'])}"


def ignored(space, where):
    """Yield a line for what NNI ignores in a search space, or reads otherwise than it is meant."""
    for key, entry in space.items():
        kind, values = entry["_type"], entry["_value"]
        at = f"{where}: {one_line(key)}"
        if others := entry.keys() - {"_type", "_value"}:
            yield f"{at}: NNI ignores {one_line(', '.join(map(str, others)))}"
        if kind != "choice" and len(values) > NUMBERS[kind]:
            yield f"{at} is {one_line(values)}; NNI uses the first {NUMBERS[kind]} for {kind}"
        for value in values:
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
                number = re.sub(r"(?i)e", ".0e", value, count=1)
                yield f"{at}: YAML reads {value} as text; for a number write {number}"
        if kind == "choice":
            for option in nested_spaces(values, at):
                yield from ignored(*option)


def nested_choices(space, where, is_option=False):
    """Yield a line for each choice of named options inside an option of another choice."""
    for key, entry in space.items():
        if entry["_type"] != "choice" or not is_nested(entry["_value"]):
            continue
        at = f"{where}: {one_line(key)}"
        if is_option:
            yield f"{at} is nested in an option: NNI's tuner fails if it does not draw that option"
            continue
        for option in nested_spaces(entry["_value"], at):
            yield from nested_choices(*option, is_option=True)


def is_number(value):
    """Return whether a value is a finite number; true and false are not."""
    return not isinstance(value, bool) and finite(value) is not None
