"""Start a hyperparameter search with NNI, on any machine.

    python search.py                       # config.yml with GPUs, configs/cpu.yml without
    python search.py configs/demo.yml      # on any machine, without a download
    python search.py --resume ID           # continue a stopped search, or watch a running one

nnisearch/ does the work. This file chooses the default configuration, refuses search spaces with
values that train.py does not allow, and loads the data before the search.
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from nnisearch import cli
from nnisearch.before import gpus
from nnisearch.before.config import shipped_class

ROOT = Path(__file__).resolve().parent


def default_config():
    """Return the path of the configuration for this machine, and the reason in words."""
    try:
        number = len(gpus.gpus())
        why = f"since nvidia-smi lists {number or 'no'} GPUs"
    except ValueError as error:
        number, why = 0, f"since {error}"
    name = "config.yml" if number else "configs/cpu.yml"
    return ROOT / name, f"{name}, {why}"


def flags_of_trial(config):
    """Return the flags of train.py in trialCommand, or None if train.py is not the trial."""
    if Path(config.trial_code_directory) != ROOT:
        return None
    command = re.search(r"(?:^|[\s/])train\.py(?:\s+([^;&|<>]*)|$)", config.trial_command or "")
    return shlex.split(command[1] or "") if command else None


def check(config):
    """Raise ValueError if train.py is the trial and refuses a value of the search space.

    A tuner that is not NNI's or nnisearch's may read the search space in another way: no check.
    """
    if flags_of_trial(config) is None or not shipped_class(config.tuner):
        return
    import train  # not at the top: it imports torch, which takes two seconds

    for key, entry in config.search_space.items():
        kind, values = entry["_type"], entry["_value"]
        if kind == "randint":  # the upper bound is excluded
            values = [int(values[0]), int(values[1]) - 1]
        elif kind != "choice":  # a range: check its bounds; a normal distribution has none
            values = [] if "normal" in kind else [float(bound) for bound in values[:2]]
        for value in values:
            args = train.parse_args(["--device", "cpu"])
            train.set_hyperparameters(args, {key: value}, "searchSpace")


def load_data(config):
    """Load train.py's data, by the flags in trialCommand, so that no trial waits for a download.

    Raises OSError or ValueError if train.py's load_data() does.
    """
    flags = flags_of_trial(config)
    if flags is None:
        return
    import train

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = train.parse_args([*flags, "--device", "cpu"])
    except SystemExit:  # the shell may read these flags in another way
        return
    args.data_dir = ROOT / args.data_dir  # a trial runs in trialCodeDirectory
    train.load_data(args)


PROJECT = cli.Project(
    command="python search.py",
    choose_command="python choose.py",
    default_config=default_config,
    default="config.yml with GPUs, configs/cpu.yml without",
    check=check,
    load_data=load_data,
    within=0.5,
)


if __name__ == "__main__":
    sys.exit(cli.main(project=PROJECT))
