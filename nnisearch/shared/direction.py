"""Which result of a search is the best: the least or the greatest."""

from pathlib import Path

DIRECTIONS = ("minimize", "maximize")
NOTE = Path("log", "direction")  # in an experiment's folder, by manager/mends.py
# NNI's tuners, and this package's, that have a direction without being given one.
MINIMIZING = "tpe tpe_legacy anneal hyperopt"
MAXIMIZING = "evolution metis gp pbt smac dngo networkmorphism regularizedevolution hyperband bohb"
DEFAULTS = dict.fromkeys(MINIMIZING.split(), "minimize")
DEFAULTS |= dict.fromkeys([*MAXIMIZING.split(), "optuna"], "maximize")
UNKNOWN = "The greatest result counts as the best: the tuner does not tell, by an optimize_mode"


def direction(params, folder):
    """Return "minimize", "maximize" or, if nothing tells it, None.

    The tuner itself has said it when the search started, by its attribute optimize_mode. If it has
    none, or nnictl has started the search, the configuration tells it: params, as NNI stores it.
    folder is the experiment's.
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
