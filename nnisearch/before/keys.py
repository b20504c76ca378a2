"""Checks the keys and values of NNI's configurations, and says in words why NNI refuses one."""

import difflib
import re
import traceback
from collections import Counter

from nni.experiment.config import ExperimentConfig, LocalConfig, RemoteConfig, utils
from nni.experiment.config.algorithm import _AlgorithmConfig
from nni.experiment.config.training_services.remote import RemoteMachineConfig

from nnisearch.shared.text import one_line

CODE_KEYS = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # nni/common/serializer.py
ALGORITHMS = ("tuner", "assessor", "advisor")
SERVICES = {"local": LocalConfig, "remote": RemoteConfig}
# {place in a configuration: NNI's class, whose fields are the keys there}
PLACES = {
    "the configuration": ExperimentConfig,
    "tuner": _AlgorithmConfig,
    "trainingService": LocalConfig,
    "trainingService of platform remote": RemoteConfig,
    "machineList": RemoteMachineConfig,
}
# {a word in NNI's name for a type: the type in our messages}
TYPES = {"int": "an integer", "str": "a text", "bool": "true or false"}
TYPES |= {"Path": "a path", "List": "a list of objects"}


def seconds(value):
    """Return a configuration's duration in seconds, 0 if NNI's manager cannot read it."""
    try:
        return utils.parse_time(value) if type(value) in (int, str) else 0
    except (ValueError, OverflowError):
        return 0


def are_gpus(value):
    """Return whether gpuIndices may have this value. May raise ValueError with the reason."""
    indices = utils.canonical_gpu_indices(value)
    utils.validate_gpu_indices(indices)
    return all(type(index) is int for index in indices)


DURATION = (lambda value: seconds(value) > 0, "more than 0 seconds, such as 90, 90s, 30m, 2h or 1d")
GPUS = (are_gpus, "a GPU's number, or several such as 0,1 or [0, 1]")
# NNI's own check also lets fatal and trace pass, with which its manager ends at its start.
LEVELS = ["error", "warning", "info", "debug"]
# {key: (a test of its value, the allowed values in words)}, for keys that NNI's own messages do not
# name, or whose bad values NNI accepts. A test may raise ValueError with a reason.
LIMITS = {
    "trialConcurrency": (lambda value: value > 0, "trialConcurrency > 0"),
    "trialGpuNumber": (lambda value: value >= 0, "trialGpuNumber >= 0"),
    "maxTrialNumber": (lambda value: value > 0, "maxTrialNumber > 0"),
    "maxTrialNumberPerGpu": (lambda value: value > 0, "maxTrialNumberPerGpu > 0"),
    "maxTrialDuration": DURATION,
    "maxExperimentDuration": DURATION,
    "logLevel": (LEVELS.__contains__, ", ".join(LEVELS)),
    "gpuIndices": GPUS,
    "tunerGpuIndices": GPUS,
    "port": (lambda value: 0 < value < 65536, "1 to 65535"),
}


def check_keys(content):
    """Check the keys and values of a configuration's content, a dict. Raises ValueError."""
    limits = {utils.case_insensitive(key): limit for key, limit in LIMITS.items()}
    for place, kind, part in objects(content):
        if not isinstance(part, dict):
            allowed = "an object with a name" if place in ALGORITHMS else "an object with keys"
            raise ValueError(f"{place} is {one_line(part)}; allowed: {allowed}")
        fields = keys_of(kind)
        for key, value in part.items():
            if not isinstance(key, str):  # YAML reads 1 as a number, and yes as true
                raise ValueError(f"the key {key!r} is no text; allowed: NNI's keys")
            name = utils.case_insensitive(key)
            if fields and name not in fields:
                raise ValueError(f"{key} is no key of {place}; allowed: {likely(name, kind)}")
            if value is not None and name in limits:
                check_value(key, value, *limits[name])
        check_unique(fields.get(utils.case_insensitive(key), key) for key in part)
        if place in ALGORITHMS:
            names = {utils.case_insensitive(key) for key in part if part[key] is not None}
            if names - {"classargs"} not in ({"name"}, {"classname", "codedirectory"}):
                allowed = "either name, or className and codeDirectory"
                raise ValueError(f"{place} is {one_line(part)}; allowed: {allowed}")


def objects(content):
    """Yield (place, NNI's class, part) of a configuration; class None: its keys are not checked."""
    yield "the configuration", ExperimentConfig, content
    for key, value in content.items():
        name = utils.case_insensitive(str(key))
        if name in ALGORITHMS and value is not None:
            yield name, _AlgorithmConfig, value
        elif name == "trainingservice" and not isinstance(value, list):
            service = value if isinstance(value, dict) else {}
            yield "trainingService", SERVICES.get(service.get("platform")), value
            for inner, machines in service.items():
                is_machines = utils.case_insensitive(str(inner)) == "machinelist"
                if is_machines and isinstance(machines, list):
                    yield from (("machineList", RemoteMachineConfig, each) for each in machines)


def keys_of(kind):
    """Return {form in which NNI compares keys: key} of a class of NNI's, {} of None."""
    fields = getattr(kind, "__dataclass_fields__", {})
    return {utils.case_insensitive(name): utils.camel_case(name) for name in fields}


def likely(name, kind):
    """Return in words the key that an unknown one may stand for: here, or in another place."""
    places = {}
    for place, other in PLACES.items():
        for field in keys_of(other):
            places.setdefault(field, []).append(place)
    for similar in difflib.get_close_matches(name, places, n=1, cutoff=0.7):
        if similar in keys_of(kind):
            return keys_of(kind)[similar]
        place = places[similar]
        return f"{keys_of(PLACES[place[0]])[similar]} in {' or '.join(place)}"
    return ", ".join(keys_of(kind).values())


def check_value(key, value, is_good, allowed):
    """Check a value by its entry in LIMITS. Raises ValueError."""
    why = ""
    try:
        if is_good(value):
            return
    except TypeError:  # NNI's own message names the right type
        return
    except ValueError as error:
        why = f": {error}"
    raise ValueError(f"{key} is {value!r}{why}; allowed: {allowed}")


def check_unique(keys):
    """Raise ValueError for a key that occurs twice; NNI would take the last one."""
    for key, count in Counter(keys).items():
        if count > 1:
            raise ValueError(f"{key} is there {count} times; allowed: a key once in an object")


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


def explanation(error):
    """Return in one line why a configuration is refused; error is of a file, of YAML or of NNI."""
    text = one_line(error).replace(' in "<unicode string>",', " at")
    if isinstance(error, OSError):
        text = error.strerror or text
    if isinstance(error, AssertionError) and not error.args:  # the failed line is the reason
        line = traceback.extract_tb(error.__traceback__)[-1].line
        text = f"allowed: {line.removeprefix('assert ')}"
    if by_class := re.fullmatch(r"(\w+Config): (.*)", text):
        text = by_class[2]
    if wrong := re.fullmatch(r"type of (\w+) \((.*)\) is not (.*)", text):
        kind = re.search(r"int|str|bool|Path|List|(?<=Literal\[')\w+", wrong[3])
        allowed = TYPES.get(kind[0], kind[0]) if kind else "an object"
        text = f"{wrong[1]} is {one_line(wrong[2], 100)}; allowed: {allowed}"
    elif by_class and by_class[1] == "LocalConfig":
        text = f"trainingService: {text}"
    # NNI's classes spell the keys in snake_case.
    fields = {name for kind in PLACES.values() for name in kind.__dataclass_fields__}
    return re.sub(
        r"(?<![\w/.-])\w+(?![\w/])",
        lambda word: utils.camel_case(word[0]) if word[0] in fields else word[0],
        text,
    )
