"""Start a search with NNI, as `nnictl create` does, but so that it starts, on any machine.

    python search.py                       # config.yml with GPUs, configs/cpu.yml without
    python search.py configs/demo.yml      # on any machine, nothing to download
    python search.py --resume ID           # go on with a stopped search, or watch one that runs

This is the project's door to nnisearch/, which starts any search of NNI. It adds which
configuration is taken by default, and which values train.py refuses.
"""

import re
import sys
from pathlib import Path

from nnisearch import cli
from nnisearch.before import gpus
from nnisearch.before.config import shipped_class

ROOT = Path(__file__).resolve().parent


def default_config():
    """Return the project's configuration for this machine, and why it is that."""
    try:
        number = len(gpus.gpus())
        why = f"since nvidia-smi lists {number or 'no'} GPUs"
    except ValueError as error:
        number, why = 0, f"since {error}"
    name = "config.yml" if number else "configs/cpu.yml"
    return ROOT / name, f"{name}, {why}"


def check(config):
    """Check that train.py, where it is the trial, takes each value and bound of the search space.

    Raises ValueError. A tuner of the user's own may make something else of its space.
    """
    is_ours = Path(config.trial_code_directory) == ROOT
    is_train_py = is_ours and re.search(r"(^|[\s/])train\.py\b", config.trial_command or "")
    if not is_train_py or not shipped_class(config.tuner):
        return
    import train  # not at the top: torch takes two seconds, which other trials need not wait

    for key, entry in config.search_space.items():
        values = entry["_value"]
        if entry["_type"] == "randint":  # without its upper bound
            values = [int(values[0]), int(values[1]) - 1]
        elif entry["_type"] != "choice":
            values = [] if "normal" in entry["_type"] else map(float, values[:2])
        for value in values:
            args = train.parse_args(["--device", "cpu"])
            train.set_hyperparameters(args, {key: value}, "searchSpace")


PROJECT = cli.Project(
    command="python search.py",
    choose_command="python choose.py",
    default_config=default_config,
    check=check,
    within=0.5,
)


if __name__ == "__main__":
    sys.exit(cli.main(project=PROJECT))
