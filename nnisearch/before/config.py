"""Loads NNI configurations as nnictl does: version 1 or 2, with or without annotation."""

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
from nni.experiment.config.utils.internal import _all_subclasses
from nni.tools.annotation import expand_annotations, generate_search_space
from nni.tools.package_utils import get_all_algo_meta

from nnisearch.results.database import DATABASE, PROFILE, open_database
from nnisearch.shared.text import one_line

PLATFORMS = "local, remote, openpai, aml, dlc, kubeflow, frameworkcontroller, adl"
# {pattern of NNI's name for a type: the name in our messages}
TYPES = {"int": "an integer", "str": "a text", "bool": "true or false"} | {
    r"typing\.Union\[pathlib\.Path, str.*": "a path",
    r"typing\.List\[nni\..*": "a list of objects",
    r"typing\.Dict.*|nni\..*": "an object",
}
CODE_KEYS = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # nni/common/serializer.py
LEVELS = ["fatal", "error", "warning", "info", "debug", "trace"]
# {key of version 1, in the form in which NNI compares keys: its replacement in version 2}
VERSION_1 = dict.fromkeys(
    ("authorname", "description", "multithread", "versioncheck", "logcollection"), "to leave it out"
) | {
    "maxexecduration": "maxExperimentDuration",
    "maxtrialnum": "maxTrialNumber",
    "maxtrialnumpergpu": "maxTrialNumberPerGpu",
    "searchspacepath": "searchSpaceFile",
    "logdir": "experimentWorkingDirectory",
    "trial": "trialCommand, trialCodeDirectory and trialGpuNumber",
    "command": "trialCommand",
    "codedir": "trialCodeDirectory; of a tuner or an assessor, codeDirectory",
    "gpunum": "trialGpuNumber",
    "builtintunername": "name",
    "builtinassessorname": "name",
    "builtinadvisorname": "name",
    "classfilename": "className, with the module before it, as in module.Class",
    "localconfig": "trainingService",
    "remoteconfig": "trainingService",
    "reuse": "reuseMode",
    "ip": "host",
    "username": "user",
    "passwd": "password",
    "sshkeypath": "sshKeyFile",
    "passphrase": "sshPassphrase",
}


def seconds(value):
    """Return a configuration's duration in seconds, 0 if NNI's manager cannot read it."""
    try:
        return 0 if isinstance(value, bool) else utils.parse_time(value)
    except (ValueError, OverflowError):
        return 0


def is_object(value):
    """Return True if a value is an object, and raise ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError("it has no keys")
    return True


def as_list(value):
    """Return a list as it is, and another value in a list."""
    return value if isinstance(value, list) else [value]


ALGORITHM = (is_object, "an object with a name, or with className and codeDirectory")
DURATION = (lambda value: seconds(value) > 0, "more than 0 seconds, such as 90, 90s, 30m, 2h or 1d")
GPUS = (
    lambda value: utils.validate_gpu_indices(utils.canonical_gpu_indices(value)) is None,
    "a GPU's number, or several such as 0,1 or [0, 1]",
)
# {key: (a test of its value, the allowed values in words)}, for keys that NNI's own messages do not
# name, or whose bad values NNI accepts. A test may raise ValueError with a reason.
LIMITS = {
    "trainingService": (
        lambda value: value != [] and all(map(is_object, as_list(value))),
        "an object with a platform, or a list of such",
    ),
    "tuner": ALGORITHM,
    "assessor": ALGORITHM,
    "advisor": ALGORITHM,
    "trialConcurrency": (lambda value: value > 0, "trialConcurrency > 0"),
    "trialGpuNumber": (lambda value: value >= 0, "trialGpuNumber >= 0"),
    "maxTrialNumber": (lambda value: value > 0, "maxTrialNumber > 0"),
    "maxTrialDuration": DURATION,
    "maxExperimentDuration": DURATION,
    "logLevel": (LEVELS.__contains__, ", ".join(LEVELS)),
    "gpuIndices": GPUS,
    "tunerGpuIndices": GPUS,
    "port": (lambda value: 0 < value < 65536, "1 to 65535"),
}


def load(path):
    """Return the configuration in the file, an ExperimentConfig in NNI's canonical form.

    Raises ValueError that names the file if NNI refuses it.
    """
    if path.exists() and not path.is_file():  # reading a pipe may block for ever
        raise ValueError(f"{path}: it is no file; allowed: a configuration of NNI in a file")
    content = None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it has no keys; allowed: a configuration of NNI")
        if "trainingServicePlatform" in content:
            content = convert_version_1(content)
        check_values(content)
        utils.set_base_path(path.parent)
        config = ExperimentConfig(**content)
        for service in services(config):
            if isinstance(service, dict):  # NNI does not know the platform
                platform = service.get("platform")
                raise ValueError(f"trainingService.platform is {platform!r}; allowed: {PLATFORMS}")
        if isinstance(config.training_service, list) and len(config.training_service) == 1:
            (service,) = config.training_service
            if hasattr(service, "reuse_mode"):  # NNI runs a list in reuse mode
                config.training_service, service.reuse_mode = service, True
        return config.canonical_copy()
    except Exception as error:  # the file, YAML and NNI's classes raise many
        raise ValueError(f"{path}: {explanation(error, content)}") from None
    finally:
        utils.unset_base_path()


def check_values(content):
    """Check a configuration's values by LIMITS. Raises ValueError that names the key.

    NNI's assertions check some of them, too, but not in `python -O`.
    """
    limits = {utils.case_insensitive(key): limit for key, limit in LIMITS.items()}
    for key, value in (item for part in objects(content) for item in part.items()):
        if not isinstance(key, str):  # YAML reads 1 as a number, and yes as true
            raise ValueError(f"the key {key!r} is no text; allowed: NNI's keys")
        is_good, allowed = limits.get(utils.case_insensitive(key), (None, None))
        why = ""
        try:
            if value is None or is_good is None or is_good(value):
                continue
        except TypeError:  # NNI's own message names the right type
            continue
        except ValueError as error:
            why = f": {error}"
        raise ValueError(f"{key} is {value!r}{why}; allowed: {allowed}")


def objects(content):
    """Yield the objects of a configuration: itself, its training services, and their machines."""
    for part in as_list(content):
        if isinstance(part, dict):
            yield part
            for key, inner in part.items():
                if utils.case_insensitive(str(key)) in ("trainingservice", "machinelist"):
                    yield from objects(inner)


def explanation(error, content):
    """Return in one line why NNI refuses a configuration, with keys in their documented spelling.

    content is the configuration as the user has written it, or as NNI has stored it.
    """
    text = one_line(error)
    if isinstance(error, OSError):
        text = error.strerror or text
    elif isinstance(error, AssertionError) and not error.args:  # the failed line is the reason
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"allowed: {re.sub(r'^assert |self[.]', '', place.line)}"
        if place.filename.endswith("algorithm.py"):
            text = "allowed of tuner and assessor: either name, or className and codeDirectory"
    elif text.endswith("'list' object has no attribute 'platform'"):
        text = "trainingService is list: nniManagerIp is not set; allowed: this machine's address"
    elif text.endswith("has no attribute 'platform'"):
        text = "trainingService is not set; allowed: an object with a platform"
    elif failed := re.search('search space file "(.*)": (.*)', text):
        why = failed[2]
        try:
            yaml.safe_load(Path(failed[1]).read_text(encoding="utf-8"))
        except Exception as cause:  # NNI's message has its repr(), without the line number
            why = getattr(cause, "strerror", None) or one_line(cause)
        text = f"searchSpaceFile is {failed[1]}: {why}"
    text = text.replace(' in "<unicode string>",', " at")
    if wrong := re.fullmatch(r"\w+: type of (\w+) \((.*)\) is not (.*)", text):
        wrappings = r"typing\.Optional\[(.*)\]|<class '(.*)'>|typing\.Literal\['(.*)'\]"
        kind = re.sub(wrappings, r"\1\2\3", wrong[3])
        given = "of another form" if "{" in wrong[2] else wrong[2]  # objects may hold passwords
        _, limits = LIMITS.get(utils.camel_case(wrong[1]), (None, kind))
        known = [words for pattern, words in TYPES.items() if re.fullmatch(pattern, kind)]
        text = f"{wrong[1]} is {given}; allowed: {(known or [limits])[0]}"
    classes = {each.__name__: each.__dataclass_fields__ for each in _all_subclasses(ConfigBase)}
    if unknown := re.search(r"([^\W_]+) does not have field\(s\) (.*)", text):
        text = misspelled(unknown[2].split(", "), unknown[1], classes, content)
    # NNI's classes spell the keys in snake_case.
    keys = {name for fields in classes.values() for name in fields}
    return re.sub(
        r"(?<![\w/.-])\w+(?![\w/])",
        lambda word: utils.camel_case(word[0]) if word[0] in keys else word[0],
        text,
    )


def misspelled(names, where, classes, content):
    """Return a text with the unknown keys of a configuration and the allowed ones.

    names are the keys in the form in which NNI compares them. where is the name of NNI's class,
    and classes is {name: fields of NNI's class}.
    """
    known = {
        name: {utils.case_insensitive(field): utils.camel_case(field) for field in fields}
        for name, fields in classes.items()
    }
    words = []
    for name in names:
        others = [other for other in known if name in known[other] and other[0] != "_"]
        likely = VERSION_1 | known[where]
        similar = [
            likely[each] for each in difflib.get_close_matches(name, likely, n=1, cutoff=0.7)
        ]
        if name not in VERSION_1 and others:
            similar = [f"there, but in {' or '.join(sorted(others))}"]
        allowed = ", ".join(similar or known[where].values())
        written = re.search("_*".join(map(re.escape, name)), str(content), re.IGNORECASE)
        words.append(f"{(written or [name])[0]} is no key of NNI's {where}; allowed: {allowed}")
    return ", ".join(words)


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
        return config.canonical_copy()
    except Exception as error:  # NNI's classes raise many
        raise ValueError(f"{where}: {explanation(error, params)}") from None


def from_stored(params, where):
    """Return the configuration in NNI's stored params of an experiment; where begins messages.

    Raises ValueError if they are no configuration, or if NNI's serializer would run code in them.
    """
    if not isinstance(params, dict):
        raise ValueError(f"{where}: its configuration is {params!r}; allowed: an object")
    check_code(params, where)
    try:
        check_values(params)
        return load_experiment_config(params)
    except Exception as error:  # NNI's classes raise many
        raise ValueError(f"{where}: {explanation(error, params)}") from None


def check_code(value, where):
    """Raise ValueError for keys that let NNI's serializer run code, and for values beyond JSON.

    This covers nested values, too. YAML can hold dates and sets.
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


def convert_version_1(content):
    """Convert a configuration of NNI's version 1 into version 2.

    Raises ValueError if NNI cannot convert it. nnictl has separate code to start such a search.
    """
    platform = content["trainingServicePlatform"]
    section = content.get(f"{platform}Config")
    logger = logging.getLogger(convert.__name__)
    logger.disabled = True  # it warns of each key that version 2 has dropped
    try:
        if (
            platform in ("kubeflow", "frameworkcontroller")
            and (section or {}).get("reuse") is False
        ):
            raise ValueError("reuse is False")
        return convert.to_v2(content)
    except Exception as error:
        why = f"{error} is missing"
        if not isinstance(error, KeyError):
            why = explanation(error, content)
        for key in ("trial", "tuner", "assessor", "advisor", f"{platform}Config"):
            if key in content and not isinstance(content[key], dict):
                why = f"{key} is {one_line(content[key])}, not an object"
        allowed = "version 2, or what NNI can convert"
        raise ValueError(f"a configuration of version 1; allowed: {allowed}; {why}") from None
    finally:
        logger.disabled = False


def expand(config, folder):
    """Expand an annotated project's code into the folder, and set config to use the result.

    Raises ValueError if the code has no annotation.
    """
    with tempfile.TemporaryDirectory() as outside:  # the folder may be inside the code's
        code = Path(outside, "code")
        code.mkdir()
        try:
            expand_annotations(str(config.trial_code_directory), str(code))
            config.search_space = generate_search_space(str(code))
        except Exception as error:  # depends on the user's code
            why = one_line(error)
            raise ValueError(f"useAnnotation: the code cannot be expanded: {why}") from None
        shutil.copytree(code, folder)
    if not config.search_space:
        where = f"the code in {config.trial_code_directory} has no annotation"
        raise ValueError(f"useAnnotation is true; allowed: false, since {where}")
    for part in (config, *services(config)):
        part.trial_code_directory = str(folder)
    config.use_annotation = False


def services(config):
    """Return a configuration's training services as a list."""
    return as_list(config.training_service)


def is_local(config):
    """Return whether all trials run on this machine."""
    return getattr(config.training_service, "platform", "several") == "local"


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
