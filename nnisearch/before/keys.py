"""Checks the values of NNI's configurations, and says in words why NNI refuses one."""

import dataclasses
import difflib
import re
from collections import Counter

from nni.experiment.config import ExperimentConfig, LocalConfig, RemoteConfig, utils
from nni.experiment.config.algorithm import _AlgorithmConfig
from nni.experiment.config.training_services.remote import RemoteMachineConfig

from nnisearch.shared.text import one_line

CODE_KEYS = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # nni/common/serializer.py
ALGORITHMS = ("tuner", "assessor", "advisor")
# {NNI's class of a part of a configuration: where the part is}
PLACES = {
    ExperimentConfig: "the configuration",
    _AlgorithmConfig: "tuner or assessor",
    LocalConfig: "trainingService",
    RemoteConfig: "trainingService of platform remote",
    RemoteMachineConfig: "machineList",
}
CLASSES = {kind.__name__: kind for kind in PLACES}
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
ABOVE_0 = (lambda value: value > 0, "an integer > 0")
# NNI's own check also lets fatal and trace pass, with which its manager ends at its start.
LEVELS = ["error", "warning", "info", "debug"]
# {key: (a test of its value, the allowed values in words)}, for keys that NNI's own messages do not
# name, or whose bad values NNI accepts. A test may raise ValueError with a reason.
LIMITS = {
    "trial_concurrency": ABOVE_0,
    "trial_gpu_number": (lambda value: value >= 0, "an integer >= 0"),
    "max_trial_number": ABOVE_0,
    "max_trial_number_per_gpu": ABOVE_0,
    "max_trial_duration": DURATION,
    "max_experiment_duration": DURATION,
    "log_level": (LEVELS.__contains__, ", ".join(LEVELS)),
    "gpu_indices": GPUS,
    "tuner_gpu_indices": GPUS,
    "port": (lambda value: 0 < value < 65536, "1 to 65535"),
}


def check_values(config):
    """Check a configuration as it is written, before NNI brings it into its canonical form.

    Raises ValueError, or AttributeError as NNI does for a key that it does not know.
    """
    for kind in ALGORITHMS:
        check_algorithm(kind, getattr(config, kind))
    service = config.training_service
    machines = getattr(service, "machine_list", None)
    machines = machines if isinstance(machines, list) else []
    for machine in machines:
        if isinstance(machine, dict):  # a key is wrong: NNI's class says which
            RemoteMachineConfig(**machine)
    for part in (config, service, *machines):
        for key, (is_good, allowed) in LIMITS.items():
            if (value := getattr(part, key, None)) is not None:
                check_value(utils.camel_case(key), value, is_good, allowed)


def check_algorithm(kind, algorithm):
    """Check that a tuner or an assessor is named in one of NNI's two ways."""
    if algorithm is None or isinstance(algorithm, dict):  # NNI itself says which key is wrong
        return
    if isinstance(algorithm, _AlgorithmConfig):
        own = (algorithm.class_name, algorithm.code_directory)
        if all(own) if algorithm.name is None else own == (None, None):
            return
        algorithm = dataclasses.asdict(algorithm)
    allowed = "an object with a name, or with className and codeDirectory"
    raise ValueError(f"{kind} is {one_line(algorithm)}; allowed: {allowed}")


def keys_of(kind):
    """Return {form in which NNI compares keys: key} of a class of NNI's."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {utils.case_insensitive(name): utils.camel_case(name) for name in names}


def likely(name, kind):
    """Return in words the key that an unknown one may stand for: here, or in another place."""
    everywhere = [key for other in PLACES for key in keys_of(other)]
    for similar in difflib.get_close_matches(name, everywhere, n=1, cutoff=0.7):
        if similar in keys_of(kind):
            return keys_of(kind)[similar]
        others = [other for other in PLACES if similar in keys_of(other)]
        where = " or ".join(PLACES[other] for other in others)
        return f"{keys_of(others[0])[similar]} in {where}"
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
    unknown = re.fullmatch(r"(\w+) does not have field\(s\) ([^,]+).*", text)
    if unknown and unknown[1] in CLASSES:
        kind = CLASSES[unknown[1]]
        return f"{unknown[2]} is no key of {PLACES[kind]}; allowed: {likely(unknown[2], kind)}"
    text = re.sub("^LocalConfig: (?!type)", "trainingService: ", text)
    text = re.sub(r"^\w+Config: ", "", text)
    if wrong := re.fullmatch(r"type of (\w+) \((.*)\) is not (.*)", text):
        kind = re.search(r"int|str|bool|Path|List|(?<=Literal\[')\w+", wrong[3])
        allowed = TYPES.get(kind[0], kind[0]) if kind else "an object"
        text = f"{wrong[1]} is {one_line(wrong[2], 100)}; allowed: {allowed}"
    # NNI's classes spell the keys in snake_case.
    fields = {field.name for kind in PLACES for field in dataclasses.fields(kind)}
    return re.sub(
        r"(?<![\w/.-])\w+(?![\w/])",
        lambda word: utils.camel_case(word[0]) if word[0] in fields else word[0],
        text,
    )
