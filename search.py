"""Start a search with NNI, as `nnictl create` does, but so that it starts, on any machine.

    python search.py                       # config.yml with GPUs, configs/cpu.yml without
    python search.py configs/demo.yml      # on any machine, nothing to download
    python search.py --resume ID           # go on with a stopped search, or watch one that runs

This is the project's door to nnisearch/, which starts any search of NNI; it adds which
configuration to take, and what train.py does not accept.
"""

import re
import sys
from pathlib import Path

from nnisearch import cli, gpus

ROOT = Path(__file__).resolve().parent


def default_config():
    """Return the project's configuration for this machine, and why it is that."""
    count = len(gpus.gpus())
    name = "config.yml" if count else "configs/cpu.yml"
    return ROOT / name, f"{name}, since nvidia-smi lists {count or 'no'} GPUs"


def check(config):
    """Check that train.py, where it is the trial, takes each value and bound of the search space.

    Raises ValueError. A tuner of the user's own may read its space in a way of its own.
    """
    is_ours = Path(config.trial_code_directory) == ROOT
    if not is_ours or not re.search(r"(^|[\s/])train\.py\b", config.trial_command or ""):
        return
    if config.tuner.class_name and not config.tuner.class_name.startswith("nnisearch."):
        return
    import train  # not at the top: torch takes two seconds, which no other trial needs

    for key, entry in config.search_space.items():
        kind, values = entry["_type"], entry["_value"]
        if kind == "randint":  # without its upper bound
            values = [values[0], values[1] - 1]
        elif kind != "choice":
            values = [] if "normal" in kind else values[:2]
        for value in values:
            train.set_hyperparameters(train.parse_args(["--device", "cpu"]), {key: value}, "space")


if __name__ == "__main__":
    sys.exit(
        cli.main(
            prog="search.py",
            choose_prog="python choose.py",
            default_config=default_config,
            check=check,
            within=0.5,
        )
    )
