"""Which GPUs this machine has, and who holds them."""

import subprocess
import xml.etree.ElementTree as ElementTree

import psutil


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
