"""Tries the machines of machineList over SSH, as NNI would use them."""

import json
import os
import subprocess
from pathlib import Path

import nni
import nni_node

from nnisearch.before.config import services
from nnisearch.shared.text import one_line

NODE = Path(nni_node.__path__[0])
SCRIPT = Path(__file__).parents[1] / "manager" / "try_machines.js"
# What runs on each machine: the imports of NNI's runner, and its call to the manager.
PROBE = """
import asyncio, json, sys
async def call():
    async with websockets.connect(sys.argv[1], open_timeout=10) as channel:
        return await asyncio.wait_for(channel.recv(), 10)
found = {"stage": "python"}
try:
    import nni, pkg_resources, psutil, websockets
    found["message"] = "it has nni " + nni.__version__
    if nni.__version__ == VERSION:
        found["stage"] = "route"
        is_ours = asyncio.run(call()) == sys.argv[2]
        found = {"stage": None if is_ours else "route", "message": "another one answers there"}
except BaseException as error:
    found["message"] = f"{type(error).__name__}: {error}"
print("<" + json.dumps(found) + ">")
"""


def check_machines(config, find_port):
    """Try all machines at once, each as NNI would use it.

    find_port() returns the port here to which their runners will connect. Returns a line for each
    machine that is off or out of reach, and so left out for now. Raises ValueError if no machine
    works, or if the configuration is wrong.
    """
    remotes = [service for service in services(config) if service.platform == "remote"]
    machines = [machine for service in remotes for machine in service.machine_list]
    if not machines:
        return []
    print(f"Trying {len(machines)} machines over SSH")
    port = find_port()
    task = {"machines": [machine.json() for machine in machines]}
    task |= {"address": config.nni_manager_ip, "port": port}
    task |= {"probe": PROBE.replace("VERSION", repr(nni.__version__))}
    tried = subprocess.run(
        [NODE / "node", "--openssl-config=/dev/null", SCRIPT],
        env=os.environ | {"NODE_PATH": f"{NODE}:{NODE / 'node_modules'}"},
        input=json.dumps(task),
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        why = one_line(tried.stderr.strip())
        raise ValueError(f"the machines of machineList cannot be tried: {why}")
    found = list(zip(machines, json.loads(tried.stdout), strict=True))
    wrong = [pair for pair in found if pair[1]["stage"] not in (None, "machine")]
    if wrong:
        raise ValueError("; ".join(fault(config, *pair, port) for pair in wrong))
    off = [f"{name(each)}: {one_line(said['message'])}" for each, said in found if said["stage"]]
    # Without reuseMode NNI ends when a machine fails.
    if len(off) == len(found) or (off and not all(service.reuse_mode for service in remotes)):
        raise ValueError(f"machineList; allowed: machines that answer; {'; '.join(off)}")
    return [f"{line}; left out until it answers" for line in off]


def fault(config, machine, found, port):
    """Return a text that names the wrong key of the configuration, and what is allowed."""
    where, why = name(machine), one_line(found["message"])
    if found["stage"] == "route":
        given = f"nniManagerIp is {config.nni_manager_ip or 'not set'}"
        return f"{given}; allowed: an address that leads from {where} to port {port} here; {why}"
    if found["stage"] == "python":
        given = f"{where}: pythonPath is {machine.python_path or 'not set'}"
        return f"{given}; allowed: the folder of a python3 there with nni {nni.__version__}; {why}"
    if machine.password:
        return f"{where}: password is not shown; allowed: {machine.user}'s password; {why}"
    given = f"{where}: sshKeyFile is {machine.ssh_key_file}"
    return f"{given}; allowed: an Ed25519 or ECDSA key with which {machine.user} can log in; {why}"


def name(machine):
    return f"machine {machine.user}@{machine.host}:{machine.port}"
