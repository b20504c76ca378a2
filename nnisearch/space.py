"""What a search space of NNI must hold: with less a search starts, and waits without a word."""

import math

from nni.common.hpo_utils import validate_search_space

from nnisearch.text import one_line


def is_number(value):
    """Return whether a value is a finite number; the true and the false of JSON are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def check_space(space, where="searchSpace"):
    """Check a search space, and those nested in it, for what NNI's tuners and Optuna's cannot take.

    Raises ValueError with one line that names the parameter, its value and what is allowed.
    """
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{where} is {space!r}; allowed: an object of parameters")
    for key, entry in space.items():
        values = entry.get("_value") if isinstance(entry, dict) else None
        is_choice = isinstance(values, list) and entry.get("_type") == "choice"
        if is_choice and not values:
            raise ValueError(f"{where}: {key} is []; allowed: at least one value")
        if is_choice:  # of any values: NNI's validator refuses None, lists and objects
            wrong = [v for v in values if isinstance(v, float) and not math.isfinite(v)]
        else:
            try:
                validate_search_space({key: entry}, raise_exception=True)
            except ValueError as error:
                raise ValueError(f"{where}: {one_line(error)}") from None
            wrong = [value for value in values if not is_number(value)]
        if wrong:
            raise ValueError(f"{where}: {key} is {values}; allowed: finite numbers")
        if entry["_type"].startswith("q") and values[2] <= 0:
            raise ValueError(f"{where}: {key} is {values}; allowed: a step above 0 as the third")
        if is_choice and is_nested(values):
            for value in values:
                part = {name: part for name, part in value.items() if name != "_name"}
                if part:
                    check_space(part, f"{where}: {key}: {value['_name']}")


def is_nested(values):
    """Return whether NNI takes the values of a choice for search spaces, of which it draws one."""
    return all(isinstance(value, dict) and "_name" in value for value in values)
