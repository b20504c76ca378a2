"""What is looked at before a search starts: the mistakes that NNI takes without a word.

NNI is the judge of what it can run, by the rehearsal; here stands what it would do wrong silently.
Each check raises ValueError with one line that names the key, its value and what is allowed.
"""

import math
import re
import shutil
import sys
import tempfile

from nnisearch.config import check_code, is_local, known_algorithms, shipped_class
from nnisearch.gpus import check_gpus
from nnisearch.text import one_line

NUMBERS = {"uniform": 2, "randint": 2, "loguniform": 2, "normal": 2, "lognormal": 2}
NUMBERS |= {"quniform": 3, "qloguniform": 3, "qnormal": 3, "qlognormal": 3}
# NNI's tuners whose search spaces are of another form.
OTHER_SPACES = ("BatchTuner", "PPOTuner", "NetworkMorphismTuner", "RegularizedEvolutionTuner")


def check(config):
    """Check a canonical configuration against this machine; return what merely looks wrong, lines.

    Raises ValueError.
    """
    if len(sys.executable.split()) > 1:  # NNI starts its tuner by a shell, unquoted
        allowed = "a Python whose path has no spaces"
        raise ValueError(f"the Python is {sys.executable!r}; allowed: {allowed}")
    check_code(config.json(), "the configuration")
    check_algorithms(config)
    if is_local(config):
        if shutil.which("ps") is None:
            raise ValueError("PATH has no ps, by which NNI ends trials; Debian: apt install procps")
        if config.trial_gpu_number:
            check_gpus(config.training_service)
    tuner = shipped_class(config.tuner)
    if tuner and not tuner.endswith(OTHER_SPACES):  # a tuner of the user's own owns its space
        check_space(config.search_space)
        return [*texts(config.search_space, "searchSpace")]
    return []


def check_algorithms(config):
    """Check that NNI has the tuner and the assessor, and that they can work in its version."""
    for kind in ("tuner", "assessor"):
        algorithm = getattr(config, kind)
        if not algorithm or not algorithm.name:
            continue
        known = known_algorithms(kind)
        if algorithm.name.lower() not in known:
            names = ", ".join(sorted(name for name, _ in known.values()))
            raise ValueError(f"{kind}.name is {algorithm.name!r}; allowed: {names}")
        if algorithm.name.lower() == "hyperband":
            allowed = "className: nnisearch.tuners.Hyperband, since NNI's ends at its first result"
            raise ValueError(f"{kind}.name is {algorithm.name!r}; allowed: {allowed}")


def check_disk(folder, size):
    """Check that NNI can write there, and that so many MB are free. Raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"experimentWorkingDirectory is '{folder}'; allowed: a folder to write to; {error}"
        ) from None
    free = shutil.disk_usage(folder).free / 1e6
    if free < size:
        room = f"allowed: a folder with {size} MB free; {free:.0f} MB are"
        raise ValueError(f"experimentWorkingDirectory is '{folder}'; {room}")


def check_space(space, where="searchSpace"):
    """Check a search space, and those nested in it, for what NNI's and Optuna's tuners misread."""
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
    """Check the values of a choice: anything, or objects that have a _name and parameters."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{at} is {one_line(values)}; allowed: a list of at least one value")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise ValueError(f"{at} is {one_line(values)}; allowed: finite numbers")
    if is_nested(values):
        for value in values:
            check_space(parameters_of(value), f"{at}: {one_line(value['_name'])}")


def check_numbers(kind, values, at):
    """Check the bounds, or mean and deviation, and the step of a parameter that is no choice."""
    wrong = f"{at} is {one_line(values)}; allowed for {kind}"
    if not isinstance(values, list) or len(values) != NUMBERS[kind]:
        raise ValueError(f"{wrong}: a list of {NUMBERS[kind]} numbers")
    try:
        numbers = [float(value) for value in values]  # as NNI does, for text too
    except (TypeError, ValueError):
        raise ValueError(f"{wrong}: numbers") from None
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
    """Return whether NNI takes the values of a choice for search spaces with names."""
    return all(isinstance(value, dict) and "_name" in value for value in values)


def parameters_of(value):
    """Return the search space in a value of a nested choice."""
    return {key: entry for key, entry in value.items() if key != "_name"}


def texts(space, where):
    """Yield a line for each number that YAML has taken for text, as it does with 1e-4."""
    for key, entry in space.items():
        values = entry["_value"]
        at = f"{where}: {one_line(key)}"
        for value in values:
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
                number = re.sub(r"(?i)e", ".0e", value, count=1)
                yield f"{at}: {value} is text to YAML; for a number write {number}"
        if entry["_type"] == "choice" and is_nested(values):
            for value in values:
                yield from texts(parameters_of(value), f"{at}: {one_line(value['_name'])}")
