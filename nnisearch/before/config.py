"""Loads NNI's configurations as nnictl does, version 1 or 2.

A loaded configuration is an ExperimentConfig in NNI's canonical form, whose trial_command,
trial_code_directory and trial_gpu_number are those that NNI will use.
"""

import functools
import json
import logging
import re
from pathlib import Path

import yaml
from nni.experiment.config import ExperimentConfig, convert, utils
from nni.experiment.config.utils import load_experiment_config
from nni.tools.package_utils import get_all_algo_meta

from nnisearch.before.gpus import allow_visible
from nnisearch.before.keys import ALGORITHMS, check_code, check_unique, check_values, explanation
from nnisearch.results.database import DATABASE, PROFILE, open_database
from nnisearch.shared.text import one_line

PLATFORMS = ("local", "remote")
UNPROTECTED = "`nnictl create` starts it, without nnisearch's protection"
# {key of version 2: the same of version 1}
VERSION_1 = {
    "maxExperimentDuration": "maxExecDuration",
    "maxTrialNumber": "maxTrialNum",
    "maxTrialNumberPerGpu": "maxTrialNumPerGpu",
    "searchSpaceFile": "searchSpacePath",
    "experimentWorkingDirectory": "logDir",
    "trainingService": "localConfig",
    "trialCommand": "command",
    "trialCodeDirectory": "codeDir",
    "trialGpuNumber": "gpuNum",
    "tuner.name": "builtinTunerName",
    "assessor.name": "builtinAssessorName",
}


class Loader(yaml.SafeLoader):
    """PyYAML's loader, but it refuses a key that stands twice in an object."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        check_unique(str(key.value) for key, _ in node.value)
        return node


def load(path):
    """Return (configuration, lines for the user) of a file.

    Raises ValueError that names the file for what NNI or nnisearch refuses.
    """
    if path.exists() and not path.is_file():  # reading a pipe may block for ever
        raise ValueError(f"{path}: it is no file; allowed: a configuration of NNI in a file")
    is_version_1 = False
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        if not isinstance(content, dict):
            raise ValueError("it has no keys; allowed: a configuration of NNI")
        if "trainingServicePlatform" in content:
            content, is_version_1 = convert_version_1(content), True
        utils.set_base_path(path.parent)
        config = ExperimentConfig(**content)
        check_support(config)
        check_values(config)
        lines = check_space_file(config)
        if config.training_service.platform == "remote" and not config.nni_manager_ip:
            config.nni_manager_ip = "127.0.0.1"  # unused; without it NNI asks for a network
        config = config.canonical_copy()
    except Exception as error:  # the file, YAML and NNI's classes raise many
        words = explanation(error)
        raise ValueError(f"{path}: {in_version_1(words) if is_version_1 else words}") from None
    finally:
        utils.unset_base_path()
    config._is_version_1 = is_version_1
    return config, lines + finish(config)


def check_support(config):
    """Raise ValueError for a kind of search that nnisearch leaves to nnictl."""
    service = config.training_service
    platform = getattr(service, "platform", None)
    if isinstance(service, dict):  # NNI does not know the platform
        platform = service.get("platform")
    if platform not in PLATFORMS:
        allowed = f"local or remote, in one object; {UNPROTECTED}"
        raise ValueError(f"platform in trainingService is {platform}; allowed: {allowed}")
    if config.use_annotation:
        allowed = "false, with nni.get_next_parameter() in the trial, and a searchSpace"
        raise ValueError(f"useAnnotation is true; allowed: {allowed}; {UNPROTECTED}")


def check_space_file(config):
    """Check the syntax of a configuration's searchSpaceFile; return lines for the user."""
    if config.search_space_file is None:
        return []
    path = Path(utils.resolve_path(config.search_space_file, utils.get_base_path()))
    try:
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text, object_pairs_hook=lambda pairs: check_unique(key for key, _ in pairs))
        except json.JSONDecodeError as error:
            yaml.load(text, Loader)
            if path.suffix == ".json":
                return [f"searchSpaceFile is {path}, which NNI reads as YAML: {error}"]
    except Exception as error:  # the file and YAML raise many
        raise ValueError(f"searchSpaceFile is {path}: {explanation(error)}") from None
    return []


def finish(config):
    """Let a canonical configuration hold what NNI will use; return lines for the user."""
    service, lines = config.training_service, []
    for key in ("trial_command", "trial_code_directory", "trial_gpu_number"):
        setattr(config, key, getattr(service, key))  # NNI prefers these to those at the top
    if is_local(config):
        if service.reuse_mode:
            service.reuse_mode = False
            lines.append("reuseMode is true; trials on this machine run without it, and faster")
        if config.trial_gpu_number:
            lines += allow_visible(service)
    return lines


def convert_version_1(content):
    """Return a configuration of version 1 as one of version 2.

    Raises ValueError for what NNI cannot convert, and for keys that it would leave out.
    """
    platform = content["trainingServicePlatform"]
    if platform not in PLATFORMS:
        allowed = f"{' or '.join(PLATFORMS)}; {UNPROTECTED}"
        raise ValueError(f"trainingServicePlatform is {platform}; allowed: {allowed}")
    for key in ("trial", *ALGORITHMS, f"{platform}Config"):
        if key in content and not isinstance(content[key], dict):
            raise ValueError(f"{key} is {one_line(content[key])}; allowed: an object")
    left_out = []

    def note(record):  # NNI's conversion only logs, as errors, what it leaves out
        if record.levelno == logging.ERROR:
            left_out.append(record.args if isinstance(record.args, tuple) else ("", record.args))
        return False

    logger = logging.getLogger(convert.__name__)
    logger.addFilter(note)
    try:
        converted = convert.to_v2(content)
    except KeyError as error:
        raise ValueError(f"{error} is missing in this configuration of version 1") from None
    finally:
        logger.removeFilter(note)
    for place, keys in left_out:
        key, value = next(iter(keys.items()))
        where = f" in {place}" if place else ""
        allowed = VERSION_1.get(key, "to leave it out")
        allowed += ", or classArgs for an argument" if place else ""
        raise ValueError(f"{key}{where} is {one_line(value)}; allowed: {allowed}; NNI ignores it")
    return converted


def in_version_1(text):
    """Return a message with the names that version 1 has for keys."""
    return re.sub("|".join(map(re.escape, VERSION_1)), lambda key: VERSION_1[key[0]], text)


def load_stored(experiment, folder):
    """Return the configuration that NNI has stored in an experiment's folder.

    Raises ValueError if it cannot be read, or if NNI's serializer would run code in it.
    """
    database = folder / DATABASE
    try:
        with open_database(database) as rows:
            ((_, stored),) = rows(PROFILE)
            params = json.loads(stored)
    except OSError as error:
        raise ValueError(f"experiment {experiment}: {error}") from None
    where = f"experiment {experiment}, in {database}"
    config = from_stored(params, where)
    try:
        check_support(config)
        check_values(config)
        config = config.canonical_copy()
    except Exception as error:  # NNI's classes raise many
        raise ValueError(f"{where}: {explanation(error)}") from None
    finish(config)
    return config


def from_stored(params, where):
    """Return the configuration in NNI's stored params of an experiment; where begins messages.

    Raises ValueError if they are no configuration, or if NNI's serializer would run code in them.
    """
    if not isinstance(params, dict):
        raise ValueError(f"{where}: its configuration is {params!r}; allowed: an object")
    check_code(params, where)
    try:
        return load_experiment_config(params)
    except Exception as error:  # NNI's classes raise many
        raise ValueError(f"{where}: {explanation(error)}") from None


def is_local(config):
    """Return whether all trials run on this machine."""
    return getattr(config.training_service, "platform", "several") == "local"  # or a list


@functools.cache
def known_algorithms(kind):
    """Return {lower-case name: (name, class)} of the tuners or assessors that NNI knows."""
    listed = [meta for meta in get_all_algo_meta() if meta.algo_type == kind]
    names = [(meta.name, meta.class_name) for meta in listed]
    names += [(meta.alias, meta.class_name) for meta in listed if meta.alias]
    return {name.lower(): (name, class_name) for name, class_name in names}


def shipped_class(algorithm, kind="tuner"):
    """Return the class name of a tuner or an assessor of NNI or of this package, else None."""
    _, listed = known_algorithms(kind).get((algorithm.name or "").lower(), (None, None))
    class_name = algorithm.class_name or listed or ""
    return class_name if class_name.startswith(("nni.", "nnisearch.")) else None
