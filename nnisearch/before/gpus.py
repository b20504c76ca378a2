"""Finds this machine's GPUs, the processes on them, and the GPUs that a search may use."""

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import psutil

from nnisearch.shared.text import one_line


def gpus():
    """Return the processes on each GPU, [[description, ...], ...], or [] without nvidia-smi.

    Raises ValueError with nvidia-smi's output if it fails.
    """
    if not shutil.which("nvidia-smi"):
        return []
    output = ""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-q", "-x"], capture_output=True, timeout=20, text=True, errors="replace"
        )
        output = answer.stderr + answer.stdout
        if "No devices were found" in output:
            return []
        answer.check_returncode()
        log, end, _ = answer.stdout.partition("</nvidia_smi_log>")  # a warning may follow
        listed = ElementTree.fromstring(log + end).findall("gpu")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        said = f"; it says: {one_line(output, 300)}" if output else ""
        raise ValueError(f"nvidia-smi fails: {one_line(error)}{said}") from None
    return [[holder(p.findtext("pid")) for p in gpu.iter("process_info")] for gpu in listed]


def holder(pid):
    """Return a process's name, PID and user, as far as they are visible."""
    try:
        process = psutil.Process(int(pid))
        return one_line(f"{process.name()} ({pid}, {process.username()})")
    except (psutil.Error, OSError, TypeError, ValueError):
        return f"process {one_line(pid)}"


def allow_visible(service):
    """Set a local training service's gpuIndices, if unset, to CUDA_VISIBLE_DEVICES.

    NNI ignores this variable. Returns lines for the user.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if service.gpu_indices is not None or visible is None:
        return []
    indices = visible.replace(" ", "").split(",")
    if all(map(str.isdecimal, indices)):
        service.gpu_indices = list(dict.fromkeys(map(int, indices)))
        return [f"The search may use GPU {', '.join(indices)}, as CUDA_VISIBLE_DEVICES says"]
    why = "with trialGpuNumber, NNI gives a trial GPUs by their numbers"
    return [
        f"Warning: CUDA_VISIBLE_DEVICES is {visible!r} and has no effect: {why};"
        " allowed: numbers, gpuIndices, or no trialGpuNumber: then trials inherit the variable"
    ]


def waiting_for(service):
    """Return a line with the processes on a local training service's GPUs; None if a GPU is free.

    If nvidia-smi fails, the line is nvidia-smi's error.
    """
    try:
        held = dict(enumerate(gpus()))
    except ValueError as error:
        return str(error)
    indices = [n for n in held if service.gpu_indices is None or n in service.gpu_indices]
    if service.use_active_gpu or not indices or not all(held[n] for n in indices):
        return None
    return "; ".join(f"GPU {n}: {', '.join(held[n])}" for n in indices)


def check_gpus(service):
    """Raise ValueError if GPUs that a local training service asks for do not exist."""
    number, wanted = len(gpus()), service.trial_gpu_number
    if not number:
        allowed = "0, for a search without GPUs, since nvidia-smi lists none"
        raise ValueError(f"trialGpuNumber is {wanted}; allowed: {allowed}")
    for index in service.gpu_indices or []:
        if index >= number:
            raise ValueError(f"gpuIndices is {index}; allowed: below {number}, nvidia-smi's GPUs")
    usable = len(service.gpu_indices or range(number))
    if wanted > usable:
        allowed = f"at most {usable}, the GPUs that nvidia-smi and gpuIndices list"
        raise ValueError(f"trialGpuNumber is {wanted}; allowed: {allowed}")
