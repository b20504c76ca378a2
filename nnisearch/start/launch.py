"""Starts NNI's manager on a free port."""

import errno
import itertools
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import nni_node
import psutil
import requests
from nni.experiment.config import ExperimentConfig
from nni.experiment.launcher import NniManagerArgs
from nni.experiment.management import generate_experiment_id

from nnisearch.shared.processes import call
from nnisearch.shared.signals import uninterrupted
from nnisearch.shared.text import one_line
from nnisearch.start import resume
from nnisearch.start.locks import held
from nnisearch.start.patches import Experiments

PORT = 8090
PATIENCE = 120  # s for NNI's web server; nnictl waits for 3
PRELOAD = Path(__file__).resolve().parent.parent / "manager" / "load.js"


@dataclass
class Experiment:
    """An experiment of NNI to start; action is "create", "resume" or "view"."""

    config: ExperimentConfig
    id: str = field(default_factory=generate_experiment_id)
    action: str = "create"

    @property
    def folder(self):
        return Path(self.config.experiment_working_directory, self.id)


def is_free(port):
    """Return whether no process on this machine listens on the port.

    Raises ValueError for a port that only root may open.
    """
    for place, family in (("", socket.AF_INET), ("::", socket.AF_INET6)):
        try:
            socket.create_server((place, port), family=family).close()
        except PermissionError as error:
            allowed = f"1024 or more, since you may not open this one: {error.strerror}"
            raise ValueError(f"--port is {port}; allowed: {allowed}") from None
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # there is no IPv6
                return False
    return True


def find_port(wanted):
    """Return a free port: wanted or, by default, PORT or above.

    Raises ValueError if wanted is not free.
    """
    for port in [wanted] if wanted else itertools.count(PORT):
        if is_free(port):
            return port
    yours = "nnictl experiment list names your searches, and nnictl stop ID ends one"
    raise ValueError(f"--port is {wanted}; allowed: a free one; {yours}")


def prepare_environment(listen, hosts, elsewhere):
    """Set the environment of NNI's manager, so that Node loads load.js with these settings.

    listen is None or the address that everybody may use, under the host names in hosts; elsewhere
    is None or elsewhere.js's settings.
    """
    options = os.environ.get("NODE_OPTIONS", "")
    settings = {"listen": listen, "host": hosts, "elsewhere": elsewhere, "nodeOptions": options}
    preload = re.sub(r'(["\\])', r"\\\1", str(PRELOAD))
    options, debuggers = re.subn(r"(?<!\S)--inspect(-brk)?(=\S*)?(?!\S)", "", options)
    if debuggers:
        reach = "all users of this machine could run commands by it"
        print(f"NODE_OPTIONS has --inspect; NNI's manager starts without that debugger: {reach}")
    os.environ["NODE_OPTIONS"] = f'--require "{preload}" {options}'
    os.environ["NNI_GUARD"] = json.dumps(settings)


def launch(experiment, wanted, watchdog, logs):
    """Start NNI's manager on a port, wanted or the first free one; return the port.

    Raises ValueError if the port is taken, and RuntimeError with the last errors in logs, a
    logs.Logs, if the start fails. watchdog undoes what has been started.
    """
    while True:
        port, process = None, None
        try:
            with held(watchdog.lock):  # otherwise two starts at once could choose the same port
                if experiment.action != "create":
                    resume.clear(experiment)
                port = find_port(wanted)
                if not wanted and port != PORT:
                    print(f"Port {PORT} is taken; {port} is the next free one")
                watchdog.note_start()
                with uninterrupted():
                    process = start_manager(experiment, port)
                wait_for_server(process, port)
                enter(experiment, port, process)
            url = f"http://localhost:{port}/api/v1/nni/experiment"
            answer = requests.post(url, json=experiment.config.json(), timeout=PATIENCE)
            if not answer.ok:
                raise OSError(one_line(answer.text))
            return port
        except Exception as error:
            words = logs.explain([error])
            watchdog.undo()
            if port and not wanted and not is_free(port):
                continue  # another user has just taken the port
            if not process:  # NNI has not caused it
                raise
            raise RuntimeError(f"the search does not start: {words}") from error


def start_manager(experiment, port):
    """Start NNI's manager as nnictl does; return its process."""
    config, folder = experiment.config, experiment.folder
    (folder / "log").mkdir(exist_ok=True)
    node = Path(nni_node.__path__[0])
    options = NniManagerArgs(
        experiment.action, experiment.id, config, port, False, False, None, None
    )
    with (
        (folder / "log" / "nnictl_stdout.log").open("a") as out,
        (folder / "log" / "nnictl_stderr.log").open("a") as err,
    ):
        err.write(f"Experiment {experiment.id} start: {datetime.now()}\n")
        return subprocess.Popen(
            [
                node / "node",
                "--max-old-space-size=4096",
                "--trace-uncaught",
                node / "main.js",
                *options.to_command_line_args(),
            ],
            cwd=node,
            stdin=subprocess.DEVNULL,  # a pseudo-terminal would not close
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def wait_for_server(process, port):
    """Wait until the manager listens on the port, at most PATIENCE seconds. Raises RuntimeError."""
    server, end = psutil.Process(process.pid), time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        # It is our own server, not another user's; IPv4 is opened after IPv6 (access.js).
        for connection in call(server, "net_connections") or []:
            is_listening = connection.status == psutil.CONN_LISTEN
            is_ipv4 = connection.family == socket.AF_INET
            if is_listening and is_ipv4 and connection.laddr.port == port:
                return
        time.sleep(0.05)
    state = "has ended" if process.poll() is not None else f"is silent after {PATIENCE} s"
    raise RuntimeError(f"NNI's web server {state}")


def enter(experiment, port, process):
    """Enter a started experiment into NNI's list. Raises OSError if that cannot be written."""
    config = experiment.config
    Experiments().add_experiment(
        experiment.id,
        port,
        int(time.time() * 1000),
        config.training_service.platform,
        config.experiment_name,
        pid=process.pid,
        webuiUrl=[f"http://127.0.0.1:{port}"],
        logDir=str(config.experiment_working_directory),
        tag=[],
    )
    if experiment.id not in Experiments().get_all_experiments():
        raise OSError("NNI's list of experiments cannot be written: is the disk full?")
