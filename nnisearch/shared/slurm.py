"""Supports trials that srun starts as SLURM jobs on a cluster's nodes."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

# srun runs this on the node before a task. It notes the time and the node in the trial's folder.
PROLOG = """#!/bin/sh
[ "$SLURM_PROCID" = 0 ] && echo "$(date +%s%3N) $SLURMD_NODENAME" >> "$NNI_SYS_DIR/{note}"
{then}
"""
NOTE = ".nni/slurm"  # below a trial's folder
# The lines of srun when SLURM, not the trial, has ended a job. JavaScript uses the pattern, too.
LOST = (
    r"^(srun|slurmstepd\S*): error: .*"
    r"(Node failure|DUE TO NODE FAILURE|DUE TO PREEMPTION|launch failed|Task launch for .* failed)"
    r".*$"
)
PATIENCE = 20  # s for an answer of SLURM's controller


def is_used(config):
    """Return whether srun starts the trials: in the command, or in a script that it runs."""
    service = config.training_service
    is_local = getattr(service, "platform", "several") == "local" and not service.reuse_mode
    if not is_local or not shutil.which("srun"):
        return False
    command = config.trial_command or ""
    texts = [command]
    for word in re.split(r"[\s;&|()'\"]+", command):
        script = os.path.join(config.trial_code_directory, word)
        if not word.endswith(".py") and os.path.isfile(script) and os.path.getsize(script) < 1e6:
            texts.append(Path(script).read_text(errors="replace"))
    return any(re.search(r"(^|[\s/;&|(])srun\s", text) for text in texts)


def job_name(id, trial):
    """Return the name of a trial's job in SLURM's queue, as slurm.js sets it."""
    return f"nni-{id}-{trial}"


def prepare(id, folder):
    """Let srun note the start of each task, and cancel jobs that an earlier manager has left."""
    prolog = folder / "slurm_prolog.sh"
    given = os.environ.get("SLURM_TASK_PROLOG")  # the user's own, which runs next
    then = f"exec {shlex.quote(given)}" if given and given != str(prolog) else "exit 0"
    prolog.write_text(PROLOG.format(note=NOTE, then=then))
    prolog.chmod(0o700)
    os.environ["SLURM_TASK_PROLOG"] = str(prolog)
    end = time.monotonic() + PATIENCE
    while (jobs := queue(id, "PENDING,RUNNING,COMPLETING")) and time.monotonic() < end:
        for name in jobs:
            ask("scancel", "--name", name)
            ask("scancel", "--name", name, "--signal=KILL")  # SIGTERM alone allows it 30 s more
        time.sleep(0.5)


def queue(id, states="PENDING,CONFIGURING"):
    """Return {name: "STATE (reason)"} of a search's jobs in these states."""
    given = ["-h", "-u", str(os.getuid()), "-t", states, "-o", "%j|%T (%r)"]
    lines = ask("squeue", *given).splitlines()
    return dict(line.rsplit("|", 1) for line in lines if line.startswith(job_name(id, "")))


def ask(*command):
    """Return the output of a SLURM command, "" if it fails or does not answer in time."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        how = {"capture_output": True, "text": True, "errors": "replace"}
        return subprocess.run(command, **how, timeout=PATIENCE).stdout
    return ""
