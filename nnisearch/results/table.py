"""Shows trials as a table."""

import json

from nnisearch.results.trials import Trial
from nnisearch.shared.text import one_line


def hyperparameters(trials: list[Trial]) -> tuple[list[dict], list[str]]:
    """Return each trial's hyperparameters as {key: value}, and a list of all keys."""
    values = [trial.hyperparameters for trial in trials]
    # A user's own tuner may give a list, for example.
    values = [each if isinstance(each, dict) else {"parameters": each} for each in values]
    return values, list(dict.fromkeys(key for each in values for key in each))


def cell(value: object) -> str:
    """Return a hyperparameter as short text for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value)
    return one_line(text, 40)


def table(trials: list[Trial], top: int, choice: Trial) -> str:
    """Return a table of the first top trials as text; an asterisk marks the choice.

    Hyperparameters that are the same in all trials have no column: a line below names them.
    """
    values, keys = hyperparameters(trials)
    first, *others = values
    same = [key for key in first if others and all(first[key] == each.get(key) for each in others)]
    keys = [key for key in keys if key not in same]
    rows = [["", "trial", "result", "seconds", "last", "area", *map(cell, keys)]]
    for trial, each in zip(trials[:top], values, strict=False):
        measured = (
            (trial.result, ".6g"),
            (trial.seconds, ".0f"),
            (trial.last, ".4g"),
            (trial.area, ".4g"),
        )
        numbers = ["-" if value is None else format(value, form) for value, form in measured]
        cells = [cell(each[key]) if key in each else "-" for key in keys]
        rows.append(["*" if trial is choice else "", str(trial.number), *numbers, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    if same:
        shared = ", ".join(f"{cell(key)} {cell(first[key])}" for key in same)
        lines.append(f"The same in all trials: {shared}")
    return "\n".join(lines)
