"""An NNI configuration, of either version, with annotation or without, loaded as nnictl does."""

import contextlib
import json
import logging
import re
import shutil
import sqlite3
import tempfile
import traceback
from pathlib import Path

import yaml
from nni.experiment.config import ExperimentConfig, convert, utils
from nni.experiment.config.utils import load_experiment_config
from nni.tools.annotation import expand_annotations, generate_search_space
from nni.tools.package_utils import get_all_algo_meta

from nnisearch.text import one_line

PLATFORMS = "local, remote, openpai, aml, dlc, kubeflow, frameworkcontroller, adl"
CODE_KEYS = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # nni/common/serializer.py


def load(path):
    """Return the configuration in the file, an ExperimentConfig in NNI's canonical form.

    Raises ValueError, naming the file, if it is none, and for what NNI itself refuses.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "trainingServicePlatform" in content:
            config = convert_version_1(path, content)
        else:
            config = ExperimentConfig.load(path)
        if isinstance(config.training_service, dict):  # of a platform that NNI does not know
            platform = config.training_service.get("platform")
            raise ValueError(f"trainingService.platform is {platform!r}; allowed: {PLATFORMS}")
        return config.canonical_copy()
    except AssertionError as error:  # NNI's have no text: the line that failed is the text
        frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
        rule = traceback.extract_tb(error.__traceback__)[-1].line.removeprefix("assert self.")
        key = re.match(r"\w*", rule)[0]
        value = getattr(frame.f_locals.get("self"), key, "not that")
        raise ValueError(f"{path}: {key} is {value!r}; allowed: {rule}") from None
    except Exception as error:  # of the file, YAML and NNI's classes
        raise ValueError(f"{path}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(Exception):  # ExperimentConfig.load() leaves it set if it fails
            utils.unset_base_path()


def load_stored(experiment, folder):
    """Return the configuration that NNI has stored of an experiment, whose folder this is.

    Raises ValueError if it holds what NNI's serializer would run, or cannot be read.
    """
    database = folder / "db" / "nni.sqlite"
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as rows:
            (stored,) = rows.execute(
                "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"
            ).fetchone()
    except (sqlite3.Error, TypeError) as error:
        why = one_line(error)
        raise ValueError(f"experiment {experiment} cannot be read: {database}: {why}") from None
    params = json.loads(stored)
    check_code(params, f"experiment {experiment}")
    return load_experiment_config(params)


def check_code(value, where):
    """Check that JSON holds no key by which NNI's serializer runs code, at any depth."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if key in CODE_KEYS:
            raise ValueError(f"{where}: {key} is {one_line(part)}; allowed: no key that runs code")
        if isinstance(part, (dict, list)):
            check_code(part, f"{where}: {one_line(key)}")


def convert_version_1(path, content):
    """Return the ExperimentConfig of what a file of NNI's version 1 holds.

    Raises ValueError for what nnictl does not convert, and then starts in a way of its own.
    """
    platform = content["trainingServicePlatform"]
    is_old = (content.get(f"{platform}Config") or {}).get("reuse") is False
    logger = logging.getLogger(convert.__name__)
    logger.disabled = True  # it warns of each key that version 2 no longer has
    try:
        if platform in ("kubeflow", "frameworkcontroller") and is_old:
            raise ValueError("reuse is False")
        converted = convert.to_v2(content)
    except Exception as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        allowed = "one of version 2, or one that NNI can convert"
        raise ValueError(f"a configuration of version 1; allowed: {allowed}; {why}") from None
    finally:
        logger.disabled = False
    utils.set_base_path(path.parent)
    return ExperimentConfig(**converted)


def expand(config, folder):
    """Set an annotated project's code, expanded into the folder, and the search space in it.

    Raises ValueError if it has none.
    """
    with tempfile.TemporaryDirectory() as outside:  # the folder may be below the code's
        code = Path(outside, "code")
        code.mkdir()
        try:
            expand_annotations(str(config.trial_code_directory), str(code))
            config.search_space = generate_search_space(str(code))
        except Exception as error:  # of whatever Python code there is
            why = one_line(error)
            raise ValueError(f"useAnnotation: the code cannot be expanded: {why}") from None
        shutil.copytree(code, folder)
    if not config.search_space:
        where = f"the code in {config.trial_code_directory} has no annotation"
        raise ValueError(f"useAnnotation is true; allowed: false, since {where}")
    services = config.training_service
    for part in (config, *(services if isinstance(services, list) else [services])):
        part.trial_code_directory = str(folder)
    config.use_annotation = False


def is_local(config):
    """Return whether the trials run on this machine."""
    return getattr(config.training_service, "platform", "several") == "local"


def known_algorithms(kind):
    """Return {name in lower case: (name, class)} of the tuners or assessors that NNI lists."""
    listed = [meta for meta in get_all_algo_meta() if meta.algo_type == kind]
    names = [(meta.name, meta.class_name) for meta in listed]
    names += [(meta.alias, meta.class_name) for meta in listed if meta.alias]
    return {name.lower(): (name, class_name) for name, class_name in names}


def shipped_class(algorithm):
    """Return the class of a tuner that comes with NNI or with this package, else None."""
    _, listed = known_algorithms("tuner").get((algorithm.name or "").lower(), (None, None))
    class_name = algorithm.class_name or listed or ""
    return class_name if class_name.startswith(("nni.", "nnisearch.")) else None
