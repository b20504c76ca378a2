"""Tells if a search minimizes or maximizes its result."""

from pathlib import Path

DIRECTIONS = {"minimize": "least", "maximize": "greatest"}
NOTE = Path("log", "direction")  # in the experiment's folder, written by manager/fixes.py
# The default optimize_mode of NNI's tuners and of this package's.
MINIMIZING = "tpe tpe_legacy anneal hyperopt"
MAXIMIZING = "evolution metis gp pbt smac dngo networkmorphism regularizedevolution hyperband bohb"
DEFAULTS = dict.fromkeys(MINIMIZING.split(), "minimize")
DEFAULTS |= dict.fromkeys([*MAXIMIZING.split(), "optuna"], "maximize")


def direction(params: dict, folder: Path) -> str | None:
    """Return "minimize", "maximize", or None if it is unknown.

    The first source is the tuner's attribute optimize_mode, which was noted in the experiment's
    folder when the search started. The second is params, the configuration as NNI stores it: nnictl
    leaves no note.
    """
    note = folder / NOTE
    noted = note.read_text(encoding="utf-8") if note.is_file() else ""
    tuner = params.get("tuner") or params.get("advisor") or {}
    written = (tuner.get("classArgs") or {}).get("optimize_mode")
    default = DEFAULTS.get(tuner_name(tuner).removesuffix("tuner"))
    return next((mode for mode in (noted, written, default) if mode in DIRECTIONS), None)


def tuner_name(tuner: dict) -> str:
    """Return the name of a tuner of NNI or of this package in lower case, "" for another one."""
    module, _, class_name = (tuner.get("className") or "").rpartition(".")
    is_ours = module.startswith(("nni.", "nnisearch."))
    return (class_name if is_ours else tuner.get("name") or "").lower()


def explanation(params: dict, folder: Path, choose: str) -> str:
    """Return a line: which result counts as the best, and what to write for the other.

    choose is the command that shows the results. It takes the direction for a tuner that has none.
    """
    mode = direction(params, folder)
    other = "maximize" if mode == "minimize" else "minimize"
    takes_mode = mode or tuner_name(params.get("tuner") or {}) in ("random", "gridsearch")
    way = f"classArgs: {{optimize_mode: {other}}} under tuner"
    if not takes_mode:
        way = f"{choose} --{other}"
    why = "" if mode else ", since no optimize_mode is known"
    best = DIRECTIONS[mode or "maximize"]
    return f"The {best} result counts as the best{why}; for the {DIRECTIONS[other]}: {way}"
