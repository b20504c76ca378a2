"""Which GPUs this machine has, which of them a search may use, and who holds them."""

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import psutil

from nnisearch.shared.text import one_line


def gpus():
    """Return the processes on each GPU, [[description, ...], ...], or [] without nvidia-smi.

    Raises ValueError, with what it has said, if nvidia-smi does not tell.
    """
    if not shutil.which("nvidia-smi"):
        return []
    said = ""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-q", "-x"], capture_output=True, timeout=20, text=True, errors="replace"
        )
        said = answer.stderr + answer.stdout
        if "No devices were found" in said:
            return []
        answer.check_returncode()
        log, end, _ = answer.stdout.partition("</nvidia_smi_log>")  # a warning may follow
        listed = ElementTree.fromstring(log + end).findall("gpu")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        said = f"; it says: {one_line(said, 300)}" if said else ""
        raise ValueError(f"nvidia-smi fails: {one_line(error)}{said}") from None
    return [[holder(p.findtext("pid")) for p in gpu.iter("process_info")] for gpu in listed]


def holder(pid):
    """Return a process's name, number and user, as far as they can be seen."""
    try:
        process = psutil.Process(int(pid))
        return one_line(f"{process.name()} ({pid}, {process.username()})")
    except (psutil.Error, TypeError, ValueError):
        return f"process {one_line(pid)}"


def allow_visible(service):
    """Let CUDA_VISIBLE_DEVICES stand for gpuIndices, where a local training service has none.

    Return a line that says so, or None. NNI itself schedules on all GPUs regardless. Raises
    ValueError for a form by which NNI cannot choose.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not service.trial_gpu_number or service.gpu_indices is not None or visible is None:
        return None
    indices = [part.strip() for part in visible.split(",") if part.strip()]
    if not all(re.fullmatch(r"\d+", index) for index in indices) or not indices:
        allowed = "numbers of GPUs, or gpuIndices in the configuration, where GPUs are scheduled"
        raise ValueError(f"CUDA_VISIBLE_DEVICES is {visible!r}; allowed: {allowed}")
    service.gpu_indices = list(dict.fromkeys(map(int, indices)))
    return f"The search may use GPU {', '.join(indices)}, as CUDA_VISIBLE_DEVICES says"


def gpus_for(service):
    """Return {index: [process, ...]} of the GPUs that a local training service may use."""
    allowed = service.gpu_indices
    return {n: held for n, held in enumerate(gpus()) if allowed is None or n in allowed}


def free_gpus(service):
    """Return the indices of the GPUs that a local training service may use now."""
    return [n for n, held in gpus_for(service).items() if service.use_active_gpu or not held]


def waiting_for(service):
    """Return a line on what the GPUs of a local training service wait for, or None if one is free.

    That is who holds them, or what nvidia-smi says in place of an answer.
    """
    try:
        found = gpus_for(service)
    except ValueError as error:
        return str(error)
    if service.use_active_gpu or not found or not all(found.values()):
        return None
    return "; ".join(f"GPU {n}: {', '.join(held)}" for n, held in found.items())


def check_gpus(service):
    """Check that the GPUs that a local training service asks for exist. Raises ValueError."""
    found, wanted = len(gpus()), service.trial_gpu_number
    for index in service.gpu_indices or []:
        if index >= found:
            raise ValueError(f"gpuIndices is {index}; allowed: below {found}, nvidia-smi's GPUs")
    usable = len(service.gpu_indices or range(found))
    if wanted > usable:
        allowed = f"at most {usable}, the GPUs that nvidia-smi and gpuIndices list"
        hint = "a search without GPUs has trialGpuNumber: 0"
        raise ValueError(f"trialGpuNumber is {wanted}; allowed: {allowed}; {hint}")
