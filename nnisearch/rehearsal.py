"""The tuner and the trial, tried as NNI would start them, before a search starts."""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from nni.runtime import msg_dispatcher_base
from nni.tools.package_utils import (
    create_builtin_class_instance,
    create_customized_class_instance,
    get_all_algo_meta,
)
from nni.tuner import Tuner

from nnisearch.gpus import free_gpus
from nnisearch.processes import stop
from nnisearch.text import one_line


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
