"""Checks the machines of machineList, and lets trials run there by OpenSSH (over_ssh.py)."""

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nni
from nni.experiment.config.training_services.local import LocalConfig
from nni.experiment.config.training_services.remote import RemoteMachineConfig

from nnisearch.elsewhere import over_ssh
from nnisearch.shared.text import one_line

MOST_FILES, MOST_MB = 2000, 300  # of the code; NNI's limits
NNIS_KEY = Path("~/.ssh/id_rsa").expanduser()
KEYS = ["secret", "host", "port", "user", "sshKeyFile", "pythonPath"]
KEYS += ["gpuIndices", "maxTrialNumberPerGpu", "useActiveGpu"]


def validate(machine: RemoteMachineConfig) -> None:
    """Check a machine, as NNI does, but without a key file: ssh may have an agent or its own."""
    super(RemoteMachineConfig, machine)._validate_canonical()
    key = machine.ssh_key_file
    if key not in (None, str(NNIS_KEY), NNIS_KEY) and not Path(key).is_file():
        raise ValueError(f"sshKeyFile is {key}; allowed: a file, or to leave it out")


RemoteMachineConfig._validate_canonical = validate


def is_used(config, stored: Path | None) -> bool:
    """Return whether trials run over SSH; stored is the folder of a search to resume."""
    is_remote = getattr(config.training_service, "platform", "several") == "remote"
    return is_remote or bool(stored and (stored / "elsewhere" / "machines.json").exists())


def prepare(config, id: str, folder: Path) -> dict:
    """Try the machines, write folder for over_ssh.py, and make config a local one.

    Raises ValueError if the configuration is wrong, or no machine works.
    """
    for program in ("ssh", "git", "tar"):
        if not shutil.which(program):
            allowed = f"one with {program}; Debian: apt install openssh-client git tar"
            raise ValueError(f"PATH is without {program}; allowed with platform remote: {allowed}")
    path = folder / "machines.json"
    if config.training_service.platform == "remote":
        folder.mkdir(mode=0o700, exist_ok=True)
        search = describe(config, id, folder)
    else:
        search = json.loads(path.read_text())
    shutil.rmtree(folder / "state", ignore_errors=True)
    (folder / "state").mkdir()
    search["code"] = f"code-{secrets.token_hex(4)}"  # new at each start, since it may be edited
    try_all(search, folder)
    pack(Path(config.trial_code_directory), folder / "code.tar.gz")
    path.write_text(json.dumps(search))
    path.chmod(0o600)
    command = shlex.join([sys.executable, "-IS", over_ssh.__file__, str(folder)])
    config.trial_command, config.trial_gpu_number = f"exec {command}", None
    config.nni_manager_ip = None
    config.training_service = LocalConfig()
    config.training_service._canonicalize([config])
    return {"kind": "ssh", "folder": str(folder), "program": over_ssh.__file__}


def describe(config, id: str, folder: Path) -> dict:
    """Return what over_ssh.py has to know. Passwords go into files of their own, for ssh."""
    machines = [machine.json() for machine in config.training_service.machine_list]
    for number, machine in enumerate(machines):
        secret = machine.get("password") or machine.get("sshPassphrase")
        machine["secret"] = next((k for k in ("password", "sshPassphrase") if machine.get(k)), None)
        if secret:
            answer = folder / f"askpass{number}"
            answer.touch(mode=0o700)
            # A question about the machine's key gets no secret.
            no = "case $1 in *yes/no*) echo no; exit ;; esac"
            answer.write_text(f"#!/bin/sh\n{no}\nprintf '%s\\n' {shlex.quote(secret)}\n")
        if machine.get("sshKeyFile") == str(NNIS_KEY):  # where the configuration names none
            machine["sshKeyFile"] = None
    return {
        "id": id,
        "command": config.trial_command,
        "trialGpuNumber": config.trial_gpu_number,
        "machines": [{key: machine.get(key) for key in KEYS} for machine in machines],
    }


def try_all(search: dict, folder: Path) -> None:
    """Try all machines at once; print a line for each that is off, and so left out for now.

    Raises ValueError if none works, or if the configuration is wrong.
    """
    machines = search["machines"]
    print(f"Trying {len(machines)} machines over SSH")
    with ThreadPoolExecutor(len(machines)) as threads:
        numbers = range(len(machines))
        answers = [*threads.map(lambda number: attempt(search, folder, number), numbers)]
    faults = [fault for fault, _ in answers if fault]
    if faults:
        raise ValueError("; ".join(faults))
    off = [line for _, line in answers if line]
    if len(off) == len(machines):
        raise ValueError(f"machineList; allowed: machines that answer; {'; '.join(off)}")
    for line in off:
        print(f"{line}; left out until it answers")


def attempt(search: dict, folder: Path, number: int) -> tuple[str | None, str | None]:
    """Try a machine; return (a fault of its configuration, why it is off), or None for each."""
    machine, state = search["machines"][number], folder / "state"
    name = over_ssh.name(machine)
    task = {"do": "try", "name": f"{search['id']}-{number}"}
    try:
        answer = over_ssh.ask(folder, number, machine, task)
    except over_ssh.Lost as why:
        fault = login_fault(machine, str(why), why.status)
        if not fault:
            (state / f"lost{number}").touch()
        return fault and f"{name}: {fault}", f"{name}: {one_line(why)}"
    if answer.get("nni") != nni.__version__:
        why = answer.get("error") or f"it has nni {answer['nni']}"
        return f"{name}: {python_fault(machine, why)}", None
    (state / f"gpus{number}").write_text(str(answer["gpus"]))
    wanted, indices = search["trialGpuNumber"] or 0, machine["gpuIndices"]
    usable = answer["gpus"] if indices is None else len(indices)
    missing = [index for index in indices or [] if index >= answer["gpus"]]
    if wanted and missing:
        limit = f"below {answer['gpus']}, nvidia-smi's GPUs there"
        return f"{name}: gpuIndices is {missing[0]}; allowed: {limit}", None
    if wanted > usable:
        limit = f"at most {usable}, the GPUs there that the search may use"
        return f"{name}: trialGpuNumber is {wanted}; allowed: {limit}", None
    return None, None


def login_fault(machine: dict, why: str, status: int | None) -> str | None:
    """Return what is wrong with a machine's configuration, None if the machine is off.

    why is what ssh has said, and status its exit status: 255 if it has not logged in.
    """
    host, port, user = machine["host"], machine["port"], machine["user"]
    login = shlex.join(["ssh", *(["-p", str(port)] if port != 22 else []), f"{user}@{host}"])
    if "HOST IDENTIFICATION HAS CHANGED" in why:
        known = host if port == 22 else f"[{host}]:{port}"
        forget = shlex.join(["ssh-keygen", "-R", known])
        return f"its host key has changed; allowed: the known one; for a new one: {forget}; {login}"
    if "Host key verification failed" in why:
        return f"its host key is unknown; allowed: one that you have accepted, by: {login}"
    if "Permission denied" in why or "authentication failures" in why:
        key, allowed = f"sshKeyFile is {machine['sshKeyFile'] or 'not set'}", "a key"
        if machine["secret"] == "password":
            key, allowed = "password is not shown", "one"
        return f"{key}; allowed: {allowed} with which {user} can log in; {one_line(why)}"
    if status not in (None, 255):
        return python_fault(machine, why)
    return None


def python_fault(machine: dict, why: str) -> str:
    path = machine["pythonPath"] or "not set"
    allowed = f"the folder of a python3 there with nni {nni.__version__}"
    return f"pythonPath is {path}; allowed: {allowed}; {one_line(why)}"


def pack(code: Path, archive: Path) -> None:
    """Pack a project's folder, but not .git and what .nniignore lists."""
    with tempfile.TemporaryDirectory() as empty:
        git = ["git", f"--git-dir={empty}", f"--work-tree={code}"]
        subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
        ignored = ["--exclude-per-directory=.nniignore"]
        experiments = archive.parents[2]
        if experiments.is_relative_to(code):
            ignored.append(f"--exclude=/{experiments.relative_to(code)}/")
        command = [*git, "ls-files", "-z", "--others", *ignored]
        names = subprocess.run(command, check=True, capture_output=True, cwd=code).stdout
    files = [code / name for name in names.decode(errors="surrogateescape").split("\0") if name]
    size = sum(file.lstat().st_size for file in files) / 1e6
    if len(files) > MOST_FILES or size > MOST_MB:
        allowed = f"at most {MOST_FILES} files and {MOST_MB} MB that .nniignore does not list"
        found = f"{len(files)} files, {size:.0f} MB"
        raise ValueError(f"trialCodeDirectory is {code}: {found}; allowed: {allowed}")
    tar = ["tar", "cz", "-f", archive, "-C", code, "--null", "--verbatim-files-from", "-T", "-"]
    packed = subprocess.run(tar, input=names, capture_output=True)
    if packed.returncode > 1:  # 1: a file has changed meanwhile
        why = one_line(packed.stderr.decode(errors="replace"))
        raise ValueError(f"trialCodeDirectory is {code}; allowed: files that tar can read; {why}")
