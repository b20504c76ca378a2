"""Supports trials that srun starts as SLURM jobs on a cluster's nodes."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from nnisearch.shared.text import one_line

# srun runs this on the node before each task. It notes the time, the node and the job in the file
# that elsewhere.js reads, and whether there are several tasks.
PROLOG = """#!/bin/sh
note="$NNI_SYS_DIR/.nni/elsewhere"
[ "$SLURM_PROCID" = 0 ] && echo "$(date +%s%3N) $SLURMD_NODENAME $SLURM_JOB_ID" >> "$note"
[ "$SLURM_PROCID" = 1 ] && echo several >> "$note"
{then}
"""
ANSWER = 20  # s for an answer of SLURM's controller
PATIENCE = 300  # s until the jobs of a killed manager have ended


def commands(config) -> str:
    """Return a local search's command and the scripts that it names; "" for other searches."""
    if getattr(config.training_service, "platform", "several") != "local":
        return ""
    command = config.trial_command or ""
    texts = [command]
    for word in re.split(r"[\s;&|()'\"]+", command):
        script = os.path.join(config.trial_code_directory, word)
        if not word.endswith(".py") and os.path.isfile(script) and os.path.getsize(script) < 1e6:
            texts.append(Path(script).read_text(errors="replace"))
    return "\n".join(texts)


def calls(program: str, text: str) -> bool:
    """Return whether a text of the shell calls a program that is installed here."""
    return bool(shutil.which(program) and re.search(rf"(^|[\s/;&|(]){program}\s", text))


def is_used(config) -> bool:
    """Return whether srun starts the trials: in the command, or in a script that it runs."""
    return calls("srun", commands(config))


def job_name(id: str, trial: str) -> str:
    """Return the name of a trial's job in SLURM's queue."""
    return f"nni-{id}-{trial}"


def warn(config) -> None:
    """Print a line if sbatch would end each trial at once."""
    text = commands(config)
    if calls("sbatch", text) and not re.search(r"\s(-W|--wait)\b", text):
        print("Warning: sbatch without --wait returns at once, and so ends each trial: take srun")


def prepare(config, id: str, folder: Path) -> dict:
    """Cancel what an earlier manager has left, and return elsewhere.js's settings.

    Raises ValueError if SLURM does not answer.
    """
    prolog = folder / "slurm_prolog.sh"
    own = os.environ.get("SLURM_TASK_PROLOG")  # the user's, which runs next
    then = f"exec {shlex.quote(own)}" if own and own != str(prolog) else "exit 0"
    prolog.write_text(PROLOG.format(then=then))
    prolog.chmod(0o700)
    cancel_jobs(id)
    environment = {"SLURM_TASK_PROLOG": str(prolog), "SLURM_EXPORT_ENV": "ALL"}
    if not re.search(r"\s(-[nN]|--n(tasks|odes))", commands(config)):
        # Otherwise some partitions, and an allocation, run a trial several times.
        names = ["SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"]
        environment |= dict.fromkeys(names, "1")
    if job := os.environ.get("SLURM_JOB_ID"):
        print(f"The trials run within SLURM's job {job}: as many at a time as have room there")
        environment["SLURM_EXACT"] = "1"  # otherwise each takes all of it
    name = job_name(id, "")
    return {"kind": "slurm", "name": name, "environment": environment, "isStep": bool(job)}


def cancel_jobs(id: str) -> None:
    """Cancel a search's jobs, and wait for their end. Raises ValueError if they stay."""
    end, why = time.monotonic() + PATIENCE, ""
    while True:
        try:
            jobs = read_queue(id, "PENDING,RUNNING,SUSPENDED,COMPLETING")
            for name in jobs:
                ask("scancel", "--name", name)
                ask("scancel", "--name", name, "--signal=KILL")  # SIGTERM allows it 30 s more
            if not jobs:
                return
        except OSError as error:
            if str(error) != why:
                why = str(error)
                print(f"SLURM does not cancel what runs of this search; it is tried again: {why}")
        if time.monotonic() > end:
            raise ValueError(f"jobs of this search still run: scancel ends them; {why}")
        time.sleep(0.5)


def queue(id: str) -> dict[str, str]:
    """Return {name: "STATE (reason)"} of a search's waiting jobs, {} if SLURM does not answer."""
    try:
        return read_queue(id, "PENDING,CONFIGURING")
    except OSError:
        return {}


def read_queue(id: str, states: str) -> dict[str, str]:
    """Return {name: "STATE (reason)"} of a search's jobs in these states. Raises OSError."""
    form = ["-h", "-u", str(os.getuid()), "-t", states, "-o", "%j|%T (%r)"]
    lines = ask("squeue", *form).splitlines()
    return dict(line.rsplit("|", 1) for line in lines if line.startswith(job_name(id, "")))


def ask(*command: str) -> str:
    """Return the output of a SLURM command. Raises OSError with its error if it fails."""
    how = {"capture_output": True, "text": True, "errors": "replace", "timeout": ANSWER}
    try:
        answer = subprocess.run(command, **how)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} does not answer") from None
    if answer.returncode:
        raise OSError(f"{command[0]}: {one_line(answer.stderr)}")
    return answer.stdout
