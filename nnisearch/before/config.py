"""An NNI configuration, of either version, with annotation or without, loaded as nnictl does."""

import contextlib
import difflib
import json
import logging
import re
import shutil
import tempfile
import traceback
from pathlib import Path

import yaml
from nni.experiment.config import ExperimentConfig, convert, utils
from nni.experiment.config.base import ConfigBase
from nni.experiment.config.utils import load_experiment_config
from nni.tools.annotation import expand_annotations, generate_search_space
from nni.tools.package_utils import get_all_algo_meta

from nnisearch.shared.results import PROFILE, opened
from nnisearch.shared.text import one_line

PLATFORMS = "local, remote, openpai, aml, dlc, kubeflow, frameworkcontroller, adl"
# Of its values, as NNI names them and in words.
TYPES = {"int": "an integer", "str": "a text", "bool": "true or false"}
CODE_KEYS = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # nni/common/serializer.py


def load(path):
    """Return the configuration in the file, an ExperimentConfig in NNI's canonical form.

    Raises ValueError, naming the file, if it is none, and for what NNI itself refuses.
    """
    if path.exists() and not path.is_file():  # which nnictl refuses, too; a pipe may wait for ever
        raise ValueError(f"{path}: it is no file; allowed: a configuration of NNI in a file")
    content = None
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
    except Exception as error:  # of the file, YAML and NNI's classes
        raise ValueError(f"{path}: {explanation(error, content)}") from None
    finally:
        with contextlib.suppress(Exception):  # ExperimentConfig.load() leaves it set if it fails
            utils.unset_base_path()


def explanation(error, content=None):
    """Return in one line why NNI refuses a configuration, with its keys as they are documented.

    content is what the user has written, as JSON has it.
    """
    classes = [ConfigBase]
    for each in classes:
        classes += each.__subclasses__()
    keys = {name for each in classes for name in getattr(each, "__dataclass_fields__", {})}
    text = one_line(error)
    frames = zip(
        traceback.walk_tb(error.__traceback__),
        traceback.extract_tb(error.__traceback__),
        strict=True,
    )
    for (frame, _), place in frames:
        config = frame.f_locals.get("self")
        named = re.search(r"\bself\.(\w+)", place.line or "")
        if not isinstance(config, ConfigBase) or not named or named[1] not in keys:
            continue
        value = getattr(config, named[1])
        is_plain = isinstance(value, (str, int, float, type(None)))
        # What has parts may have a password among them.
        given = f"{named[1]} is {repr(value) if is_plain else type(value).__name__}"
        if utils.is_missing(value):
            text = f"{named[1]} is not set"
        elif "parse_time" in place.line:
            text = f"{given}; allowed: more than 0 seconds, such as 90, 90s, 30m, 2h or 1d"
        elif isinstance(error, AssertionError) and not error.args:  # its line is the text
            text = f"{given}; allowed: {re.sub(r'^assert |self[.]', '', place.line)}"
        elif named[1] not in text:
            text = f"{given}: {text}"
    if isinstance(error, OSError):
        text = error.strerror or text
    if wrong := re.fullmatch(r"\w+: type of (\w+) \((.*)\) is not (.*)", text):
        kind = re.sub(r"typing\.Optional\[(\w+)\]|<class '(\w+)'>", r"\1\2", wrong[3])
        text = f"{wrong[1]} is {wrong[2]}; allowed: {TYPES.get(kind, kind)}"
    if unknown := re.search(r"([^\W_]+) does not have field\(s\) (.*)", text):
        text = misspelled(unknown[2].split(", "), f"NNI's {unknown[1]}", keys, content)
    # NNI's classes have the keys as Python writes names.
    return re.sub(
        r"(?<![\w/.-])\w+(?![\w/])",
        lambda word: utils.camel_case(word[0]) if word[0] in keys else word[0],
        text,
    )


def misspelled(names, where, keys, content):
    """Return in words which keys NNI does not know, given their names as NNI compares them."""
    known = {utils.case_insensitive(key): utils.camel_case(key) for key in keys}
    written = {utils.case_insensitive(key): key for key in keys_in(content)}
    words = []
    for name in names:
        similar = [known[each] for each in difflib.get_close_matches(name, known, n=1)]
        allowed = f"; allowed: {similar[0]}" if similar else ""
        words.append(f"{written.get(name, name)} is no key of {where}{allowed}")
    return ", ".join(words)


def keys_in(value):
    """Yield all keys, as text, in what is of JSON."""
    if isinstance(value, dict):
        yield from map(str, value)
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from keys_in(part)


def load_stored(experiment, folder):
    """Return the configuration that NNI has stored of an experiment, whose folder this is.

    Raises ValueError if it holds what NNI's serializer would run, or cannot be read.
    """
    database = folder / "db" / "nni.sqlite"
    try:
        with opened(database) as rows:
            params = json.loads(rows(PROFILE)[0][0])
    except OSError as error:
        raise ValueError(f"experiment {experiment}: {error}") from None
    where = f"experiment {experiment}, in {database}"
    config = from_stored(params, where)
    try:
        return config.canonical_copy()
    except Exception as error:  # of NNI's classes
        raise ValueError(f"{where}: {explanation(error)}") from None


def from_stored(params, where):
    """Return the configuration in what NNI has stored of an experiment; where is for errors.

    Raises ValueError if it holds what NNI's serializer would run, or is no configuration.
    """
    if not isinstance(params, dict):
        raise ValueError(f"{where}: its configuration is {params!r}; allowed: an object")
    check_code(params, where)
    try:
        return load_experiment_config(params)
    except Exception as error:  # of NNI's classes
        raise ValueError(f"{where}: {explanation(error)}") from None


def check_code(value, where):
    """Check that what is to be JSON can be, and that no key makes NNI's serializer run code.

    YAML has dates, and sets. Raises ValueError, at any depth.
    """
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if key in CODE_KEYS:
            raise ValueError(f"{where}: {key} is {one_line(part)}; allowed: no key that runs code")
        if isinstance(part, (dict, list)):
            check_code(part, f"{where}: {one_line(key)}")
        elif not isinstance(part, (str, int, float, type(None))):
            allowed = "a text, a number, true, false, null, a list or an object"
            raise ValueError(f"{where}: {one_line(key)} is {one_line(part)}; allowed: {allowed}")


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
