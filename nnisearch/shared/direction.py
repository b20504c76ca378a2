"""Tells if a search minimizes or maximizes its result."""

from pathlib import Path

DIRECTIONS = ("minimize", "maximize")
NOTE = Path("log", "direction")  # in the experiment's folder, written by manager/fixes.py
# The default optimize_mode of NNI's tuners and of this package's.
MINIMIZING = "tpe tpe_legacy anneal hyperopt"
MAXIMIZING = "evolution metis gp pbt smac dngo networkmorphism regularizedevolution hyperband bohb"
DEFAULTS = dict.fromkeys(MINIMIZING.split(), "minimize")
DEFAULTS |= dict.fromkeys([*MAXIMIZING.split(), "optuna"], "maximize")
UNKNOWN = "The greatest result counts as the best: no optimize_mode is known"


def direction(params, folder):
    """Return "minimize", "maximize", or None if it is unknown.

    The first source is the tuner's attribute optimize_mode, which was noted in the experiment's
    folder when the search started. The second is params, the configuration as NNI stores it: nnictl
    leaves no note.
    """
    note = folder / NOTE
    said = note.read_text(encoding="utf-8") if note.is_file() else ""
    tuner = params.get("tuner") or params.get("advisor") or {}
    given = (tuner.get("classArgs") or {}).get("optimize_mode")
    name = tuner.get("name") or ""
    module, _, class_name = (tuner.get("className") or "").rpartition(".")
    if module.startswith(("nni.", "nnisearch.")):
        name = class_name
    default = DEFAULTS.get(name.lower().removesuffix("tuner"))
    return next((found for found in (said, given, default) if found in DIRECTIONS), None)
