"""What search.py looks at before it starts a search: the mistakes that NNI takes without a word.

Each check raises ValueError with one line that names the key, its value and what is allowed. What
train.py allows is checked only where it is the trial; all else holds for any trial of NNI.
"""

import math
import shutil
import tempfile
from pathlib import Path

from nni.common.hpo_utils import validate_search_space

from nnisearch.config import is_local
from nnisearch.gpus import check_gpus
from nnisearch.rehearsal import ask_tuner, try_trial
from nnisearch.text import one_line

TRIAL_SIZE = 0.2  # MB on the disk, of a trial of 300 reports
EXPERIMENT_SIZE = 50  # MB on the disk: logs and database of a long search


def check(config):
    """Check a canonical configuration against this machine. Raises ValueError."""
    home = Path(config.experiment_working_directory)
    paths = {"experimentWorkingDirectory": home}
    if is_local(config):
        paths["trialCodeDirectory"] = Path(config.trial_code_directory)
    for key, path in paths.items():
        if len(str(path).split()) > 1:  # NNI does not quote them in its scripts
            raise ValueError(f"{key} is {str(path)!r}; allowed: a path without spaces")
    check_disk(home, config.max_trial_number or 0)
    if is_local(config) and config.trial_gpu_number:
        check_gpus(config.training_service)
    check_space(config.search_space)
    number, possible = config.max_trial_number or 1, combinations(config.search_space)
    if possible < number:
        allowed = f"at most {possible}, the combinations that searchSpace holds"
        raise ValueError(f"maxTrialNumber is {number}; allowed: {allowed}")
    ask_tuner(config)
    if is_local(config):
        try_trial(config)


def check_disk(folder, trials):
    """Check that NNI can write there, and has room for a search of so many trials."""
    needed = EXPERIMENT_SIZE + TRIAL_SIZE * trials
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"experimentWorkingDirectory is '{folder}'; allowed: a folder to write to; {error}"
        ) from None
    free = shutil.disk_usage(folder).free / 1e6
    if free < needed:
        room = f"allowed: a folder with {needed:.0f} MB free; {free:.0f} MB are"
        raise ValueError(f"experimentWorkingDirectory is '{folder}'; {room}")


def combinations(space):
    """Return how many different sets of parameters a search space of NNI holds, perhaps inf."""

    def count(entry):
        kind, values = entry["_type"], entry["_value"]
        if kind == "choice":
            nested = [value for value in values if isinstance(value, dict)]
            parts = [{k: v for k, v in value.items() if k != "_name"} for value in nested]
            return len(values) - len(nested) + sum(combinations(part) for part in parts)
        if kind == "randint":
            return values[1] - values[0]
        if kind in ("quniform", "qloguniform"):
            return math.floor(values[1] / values[2]) - math.ceil(values[0] / values[2]) + 1
        return math.inf

    return math.prod(count(entry) for entry in space.values())


def check_space(space, where="searchSpace"):
    """Check a search space, and those nested in it, by NNI's validator and for what it misses."""
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{where} is {space!r}; allowed: an object of parameters")
    for key, entry in space.items():
        values = entry.get("_value") if isinstance(entry, dict) else None
        is_choice = isinstance(values, list) and entry.get("_type") == "choice"
        if is_choice and not values:
            raise ValueError(f"{where}: {key} is {values}; allowed: at least one value")
        # NNI's validator refuses None among a choice's values, which its tuners take.
        shown = (
            entry | {"_value": [v for v in values if v is not None] or [0]} if is_choice else entry
        )
        try:
            validate_search_space({key: shown}, raise_exception=True)
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from None
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {key} is {values}; allowed: finite numbers")
            if isinstance(value, dict) and len(value) > 1:
                part = {name: part for name, part in value.items() if name != "_name"}
                check_space(part, f"{where}: {key}: {value.get('_name')}")
        if entry["_type"].startswith("q") and values[2] <= 0:
            raise ValueError(f"{where}: {key} is {values}; allowed: a step above 0 as the third")
