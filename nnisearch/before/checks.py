"""Checks a configuration, before a search starts, for mistakes that NNI ignores.

What fails is seen at the start; these checks find what NNI would do wrong without a word, or late.
Each raises ValueError with one line that names the key, the value and what is allowed.
"""

import grp
import ipaddress
import os
import pwd
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from nnisearch.before.config import in_version_1, is_local, known_algorithms, shipped_class
from nnisearch.before.gpus import check_gpus
from nnisearch.before.keys import check_code
from nnisearch.before.space import check_space, ignored, nested_choices

# {class of NNI that fails with today's packages: (what it works with, what to take instead)};
# "" if it works with nothing: https://github.com/microsoft/nni/issues/5263
NEEDS = {
    "GPTuner": ("scipy<1.11", "GPSampler"),
    "MetisTuner": ("scipy<1.11", "GPSampler"),
    "DNGOTuner": ("pybnn", "GPSampler"),
    "HyperoptTuner": ("hyperopt", "TPESampler"),
    "SMACTuner": ("smac4nni", "TPESampler"),
    "NetworkMorphismTuner": ("numpy<1.24", "TPESampler"),
    "PPOTuner": ("gym", "TPESampler"),
    "Hyperband": ("", "TPESampler"),
    "BOHB": ("", "TPESampler"),
    "CurvefittingAssessor": ("numpy<1.24", "Medianstop"),
}
PACKAGE = Path(__file__).resolve().parents[1]

# NNI's tuners whose search space has another form.
OTHER_SPACES = ("BatchTuner", "PPOTuner", "NetworkMorphismTuner", "RegularizedEvolutionTuner")

# Tuners that raise KeyError for a choice nested in an option that they have not drawn.
SHALLOW_SPACES = ("TpeTuner", "RandomTuner", "GridSearchTuner")


def check(config):
    """Check a finished configuration; return a list of warnings, one line each.

    Raises ValueError for what cannot work on this machine.
    """
    try:
        check_code(config.json(), "the configuration")
        check_algorithms(config)
        check_localhost()
        if is_local(config) and config.trial_gpu_number:
            check_gpus(config.training_service)
        lines, tuner = [], shipped_class(config.tuner)
        if tuner and not tuner.endswith(OTHER_SPACES):  # a user's own tuner may take any space
            check_space(config.search_space)
            lines += ignored(config.search_space, "searchSpace")
            if tuner.endswith(SHALLOW_SPACES):
                lines += nested_choices(config.search_space, "searchSpace")
    except ValueError as error:
        is_old = getattr(config, "_is_version_1", False)
        raise ValueError(in_version_1(str(error)) if is_old else error) from None
    return lines


def check_algorithms(config):
    """Check that NNI has the tuner and the assessor, and that they work with what is installed."""
    for kind in ("tuner", "assessor"):
        algorithm = getattr(config, kind)
        if not algorithm:
            continue
        listed = known_algorithms(kind)
        if algorithm.name and algorithm.name.lower() not in listed:
            working = [name for name, path in listed.values() if not refusal(path)]
            names = ", ".join(sorted(working))
            raise ValueError(f"{kind}.name is {algorithm.name!r}; allowed: {names}")
        needed, instead = refusal(shipped_class(algorithm, kind)) or ("", None)
        if instead:
            if kind == "tuner":
                where = f"className: nnisearch.tuners.OptunaTuner, codeDirectory: {PACKAGE.parent}"
                instead = f"{where} and classArgs: {{sampler: {instead}}}"
            chosen = algorithm.name or algorithm.class_name
            why = f"NNI's needs {needed}" if needed else "NNI's fails at its first result"
            raise ValueError(f"{kind} is {chosen}; allowed: {instead}; {why}")


def refusal(class_path):
    """Return the entry of NEEDS for a class that does not work with what is installed, or None."""
    needed, instead = NEEDS.get((class_path or "").rpartition(".")[2], ("", None))
    return (needed, instead) if instead and not (needed and is_installed(needed)) else None


def is_installed(requirement):
    """Return whether a package is installed that meets a requirement such as "scipy<1.11"."""
    needed = Requirement(requirement)
    with suppress(PackageNotFoundError):
        return needed.specifier.contains(version(needed.name))
    return False


def check_localhost():
    """Check that NNI's programs can connect to each other."""
    try:
        addresses = {place[4][0].split("%")[0] for place in socket.getaddrinfo("localhost", None)}
    except OSError:
        addresses = set()
    if not addresses or not all(ipaddress.ip_address(each).is_loopback for each in addresses):
        there = ", ".join(sorted(addresses)) or "unknown to this machine"
        allowed = "127.0.0.1 or ::1, by a line `127.0.0.1 localhost` in /etc/hosts"
        raise ValueError(f"localhost is {there}; allowed: {allowed}; NNI's programs connect there")


def check_private(folder, key="experimentWorkingDirectory"):
    """Check that no other user can replace files in a folder: NNI runs some of them.

    Who owns a parent, or can write to it, can replace the folder, so parents are checked, too. In a
    sticky folder only its owner can replace what belongs to others. HOME's parents are not checked:
    who can write there can run commands as this user anyway.

    Raises ValueError that names the folder's key in the configuration.
    """
    there, home = folder.resolve(), Path.home().resolve()
    above = [parent for parent in there.parents if not home.is_relative_to(parent)]
    for place in filter(Path.exists, [there, *above]):
        info = place.stat()
        is_open_to_group = info.st_mode & stat.S_IWGRP and not is_private_group(info.st_gid)
        is_open = info.st_mode & stat.S_IWOTH or is_open_to_group
        if info.st_uid not in (0, os.getuid()):
            why = f"'{place}' belongs to user {info.st_uid}"
        elif is_open and not info.st_mode & stat.S_ISVTX:
            why = f"others can write to '{place}': chmod go-w '{place}'"
        else:
            continue
        allowed = "a folder that, like its parents, is yours or root's and only you can write to"
        raise ValueError(f"{key} is '{folder}'; allowed: {allowed}; {why}")


def is_private_group(number):
    """Return whether a group is this user's private group, which many systems create per user.

    Such a group has the user's name and no other member. Without names, it has the user's number.
    """
    with suppress(KeyError):
        group, name = grp.getgrgid(number), pwd.getpwuid(os.getuid()).pw_name
        return group.gr_name == name and set(group.gr_mem) <= {name}
    return number == os.getuid()


def check_disk(folder, size, key="experimentWorkingDirectory"):
    """Check that NNI can write to a folder or create it, and that size MB are free there.

    Raises ValueError that names the folder's key in the configuration.
    """
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{key} is '{folder}'; allowed: a folder to write to; {why}") from None
    free = shutil.disk_usage(there).free / 1e6
    if free < size:
        allowed = f"allowed: a folder with {size} MB free; {free:.0f} MB are free"
        raise ValueError(f"{key} is '{folder}'; {allowed}")
