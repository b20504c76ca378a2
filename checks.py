"""What search.py looks at before it starts a search: the mistakes that NNI takes without a word.

Each check raises ValueError with one line that names the key, its value and what is allowed. What
train.py allows is checked only where it is the trial; all else holds for any trial of NNI.
"""

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
from nni.common.hpo_utils import validate_search_space
from nni.experiment.config import ExperimentConfig, utils
from nni.runtime import msg_dispatcher_base
from nni.tools.package_utils import (
    create_builtin_class_instance,
    create_customized_class_instance,
    get_all_algo_meta,
)
from nni.tuner import Tuner

ROOT = Path(__file__).resolve().parent
TRIAL_SIZE = 0.2  # MB on the disk, of a trial of 300 reports
EXPERIMENT_SIZE = 50  # MB on the disk: logs and database of a long search
PLATFORMS = "local, remote, openpai, aml, dlc, kubeflow, frameworkcontroller, adl"


def one_line(error):
    """Return what an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def load(path):
    """Return the configuration in the file, an ExperimentConfig in NNI's canonical form."""
    try:
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


def is_local(config):
    """Return whether the trials run on this machine."""
    return getattr(config.training_service, "platform", "several") == "local"


def check(config):
    """Check a canonical configuration against this machine. Raises ValueError."""
    home = Path(config.experiment_working_directory)
    paths = {"experimentWorkingDirectory": home}
    if is_local(config):
        paths["trialCodeDirectory"] = Path(config.trial_code_directory)
    for key, path in paths.items():
        if len(str(path).split()) > 1:  # NNI does not quote them in its scripts
            raise ValueError(f"{key} is {str(path)!r}; allowed: a path without spaces")
    if is_local(config) and shutil.which("ps") is None:
        raise ValueError("PATH has no ps, by which NNI ends trials; Debian: apt install procps")
    check_disk(home, config.max_trial_number or 0)
    if is_local(config) and config.trial_gpu_number:
        check_gpus(config.training_service)
    check_space(config.search_space)
    number, possible = config.max_trial_number or 1, combinations(config.search_space)
    if possible < number:
        allowed = f"at most {possible}, the combinations that searchSpace holds"
        raise ValueError(f"maxTrialNumber is {number}; allowed: {allowed}")
    sample = ask_tuner(config)
    with ThreadPoolExecutor(1) as pool:
        trial = pool.submit(try_trial, config) if is_local(config) else None
        if train_settings(config):
            check_train(config.search_space, sample)
        if trial:
            trial.result()


def check_disk(folder, trials):
    """Check that NNI can write there, and has room for a search of so many trials."""
    needed = EXPERIMENT_SIZE + TRIAL_SIZE * trials
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"experimentWorkingDirectory is '{folder}'; allowed: a folder to write to; {error}"
        ) from None
    free = shutil.disk_usage(folder).free / 1e6
    if free < needed:
        room = f"allowed: a folder with {needed:.0f} MB free; {free:.0f} MB are"
        raise ValueError(f"experimentWorkingDirectory is '{folder}'; {room}")


def gpus():
    """Return the processes on each GPU, [[description, ...], ...], or [] without nvidia-smi."""
    try:
        printed = subprocess.run(
            ["nvidia-smi", "-q", "-x"], capture_output=True, check=True, timeout=20
        ).stdout
        listed = ElementTree.fromstring(printed).findall("gpu")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError):
        return []
    return [[describe(p.findtext("pid")) for p in gpu.iter("process_info")] for gpu in listed]


def describe(pid):
    """Return a process's name, number and user, as far as they can be seen."""
    try:
        process = psutil.Process(int(pid))
        return f"{process.name()} ({pid}, {process.username()})"
    except (psutil.Error, TypeError, ValueError):
        return f"process {pid}"


def gpus_for(service):
    """Return {index: [process, ...]} of the GPUs that a local training service may use."""
    allowed = service.gpu_indices
    return {n: held for n, held in enumerate(gpus()) if allowed is None or n in allowed}


def free_gpus(service):
    """Return the indices of the GPUs that a local training service may use now."""
    return [n for n, held in gpus_for(service).items() if service.use_active_gpu or not held]


def waiting_for(service):
    """Return a line on who holds the GPUs of a local training service, or None if one is free."""
    found = gpus_for(service)
    if service.use_active_gpu or not found or not all(found.values()):
        return None
    return "; ".join(f"GPU {n}: {', '.join(held)}" for n, held in found.items())


def check_gpus(service):
    """Check that the GPUs that a local training service asks for exist."""
    found, wanted = len(gpus()), service.trial_gpu_number
    for index in service.gpu_indices or []:
        if index >= found:
            raise ValueError(f"gpuIndices is {index}; allowed: below {found}, nvidia-smi's GPUs")
    usable = len(service.gpu_indices or range(found))
    if wanted > usable:
        allowed = f"at most {usable}, the GPUs that nvidia-smi and gpuIndices list"
        hint = "configs/cpu.yml searches without GPUs"
        raise ValueError(f"trialGpuNumber is {wanted}; allowed: {allowed}; {hint}")


def combinations(space):
    """Return how many different sets of parameters a search space of NNI holds, perhaps inf."""

    def count(entry):
        kind, values = entry["_type"], entry["_value"]
        if kind == "choice":
            nested = [value for value in values if isinstance(value, dict)]
            parts = [{k: v for k, v in value.items() if k != "_name"} for value in nested]
            return len(values) - len(nested) + sum(combinations(part) for part in parts)
        if kind == "randint":
            return values[1] - values[0]
        if kind in ("quniform", "qloguniform"):
            return math.floor(values[1] / values[2]) - math.ceil(values[0] / values[2]) + 1
        return math.inf

    return math.prod(count(entry) for entry in space.values())


def check_space(space, where="searchSpace"):
    """Check a search space, and those nested in it, by NNI's validator and for what it misses."""
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{where} is {space!r}; allowed: an object of parameters")
    for key, entry in space.items():
        values = entry.get("_value") if isinstance(entry, dict) else None
        is_choice = isinstance(values, list) and entry.get("_type") == "choice"
        if is_choice and not values:
            raise ValueError(f"{where}: {key} is {values}; allowed: at least one value")
        # NNI's validator refuses None among a choice's values, which its tuners take.
        shown = (
            entry | {"_value": [v for v in values if v is not None] or [0]} if is_choice else entry
        )
        try:
            validate_search_space({key: shown}, raise_exception=True)
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from None
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {key} is {values}; allowed: finite numbers")
            if isinstance(value, dict) and len(value) > 1:
                part = {name: part for name, part in value.items() if name != "_name"}
                check_space(part, f"{where}: {key}: {value.get('_name')}")
        if entry["_type"].startswith("q") and values[2] <= 0:
            raise ValueError(f"{where}: {key} is {values}; allowed: a step above 0 as the third")


def ask_tuner(config):
    """Return a dict of parameters from a search's tuner, {} from one that NNI calls an advisor."""
    tuner = create("tuner", config.tuner)
    if config.assessor:
        create("assessor", config.assessor)
    if not isinstance(tuner, Tuner):
        return {}
    try:
        tuner.update_search_space(config.search_space)
        return tuner.generate_parameters(0)
    except Exception as error:  # whatever a tuner raises
        raise ValueError(f"searchSpace: the tuner cannot read it: {one_line(error)}") from None


def create(kind, algorithm):
    """Return NNI's tuner or assessor that an algorithm's configuration describes."""
    known = sorted(meta.name for meta in get_all_algo_meta() if meta.algo_type == kind)
    if algorithm.name and algorithm.name.lower() not in map(str.lower, known):
        raise ValueError(f"{kind}.name is {algorithm.name!r}; allowed: {', '.join(known)}")
    # An advisor wants to know where the manager is; with this address it does without.
    nowhere = SimpleNamespace(NNI_TUNER_COMMAND_CHANNEL="ws://_unittest_")
    try:
        with mock.patch.object(msg_dispatcher_base, "dispatcher_env_vars", nowhere):
            if algorithm.name:
                arguments = dict(algorithm.class_args or {})
                return create_builtin_class_instance(algorithm.name, arguments, f"{kind}s")
            return create_customized_class_instance(algorithm.json())
    except Exception as error:  # whatever a tuner raises
        given = f"{algorithm.name or algorithm.class_name} with {algorithm.class_args}"
        raise ValueError(f"{kind} is {given}; allowed: {one_line(error)}") from None


def train_settings(config):
    """Return train.py's settings for the trial command, or None where the trial is something else.

    Raises ValueError for a flag or a value that train.py refuses.
    """
    words = shlex.split(config.trial_command)
    folder = Path(config.trial_code_directory)
    scripts = [n for n, word in enumerate(words) if (folder / word).resolve() == ROOT / "train.py"]
    if not scripts:
        return None
    import train  # not at the top: torch takes two seconds, which no other trial needs

    given = dict(word.split("=", 1) for word in words[: scripts[0]] if re.match(r"\w+=", word))
    refusal = io.StringIO()
    try:
        with mock.patch.dict(os.environ, given), contextlib.redirect_stderr(refusal):
            # On the CPU: a process of this command's on a GPU would keep the trials from it.
            return train.parse_args([*words[scripts[0] + 1 :], "--device", "cpu"])
    except SystemExit:
        _, _, why = one_line(refusal.getvalue()).partition("error: ")
        raise ValueError(f"trialCommand is {config.trial_command!r}: {why}") from None


def check_train(space, sample):
    """Check that train.py takes a search space's keys, values and bounds, and a sample of it."""
    import train

    samples = []
    for key, entry in space.items():
        kind, values = entry["_type"], entry["_value"]
        if kind == "randint":  # without its upper bound
            values = [values[0], values[1] - 1]
        elif kind != "choice":
            values = [] if "normal" in kind else values[:2]
        samples += [{key: value} for value in values]
    for values in [*samples, sample]:
        train.set_hyperparameters(train.parse_args(["--device", "cpu"]), values, "searchSpace")


def reason(text):
    """Return the line of a trial's stderr that says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(\b|[a-z])([Ee]rror|Exception): \S", line)]
    return [*lines[-1:], *errors][-1] if lines else "nothing on stderr: was it killed?"


def try_trial(config, seconds=60):
    """Run the trial command as NNI would, until it asks for its parameters or the time is over.

    While there are too few free GPUs for it, it is not tried. Raises ValueError, with the reason
    that it has printed, if it fails before.
    """
    number = config.trial_gpu_number
    free = free_gpus(config.training_service) if number else []
    if number and len(free) < number:
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        values = {"SYS_DIR": folder, "OUTPUT_DIR": folder, "CODE_DIR": config.trial_code_directory}
        values |= {"PLATFORM": "local", "EXP_ID": "try", "TRIAL_JOB_ID": "try", "TRIAL_SEQ_ID": "0"}
        environment = os.environ | {f"NNI_{key}": str(value) for key, value in values.items()}
        if number is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, free[:number])) or "-1"
        process = subprocess.Popen(
            ["bash", "-c", config.trial_command],
            cwd=config.trial_code_directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        asked = Path(folder, ".nni", "metrics")  # where it asks, finding no parameters
        end = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < end:
                if asked.exists() and asked.stat().st_size:
                    return
                time.sleep(0.05)
        finally:
            stop(process)
        if process.returncode > 0:
            errors.seek(0)
            why = reason(errors.read())
            raise ValueError(f"trialCommand is {config.trial_command!r}, which fails: {why}")


def stop(process):
    """End a process and all that it has started, as NNI does: in five seconds at most."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
        for how in (psutil.Process.terminate, psutil.Process.kill):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    how(member)
            _, family = psutil.wait_procs(family, timeout=5)
    process.wait()
