"""Start NNI's manager on a free port, or leave nothing behind."""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

from nni.experiment import RunMode, rest
from nni.tools.nnictl.config_utils import Experiments
from nni.tools.nnictl.nnictl_utils import update_experiment

from nnisearch.patches import PATIENCE, patience
from nnisearch.processes import stop

PORT = 8090
PRELOAD = Path(__file__).resolve().parent / "manager.js"


def is_free(port):
    """Return whether nothing on this machine listens on the port."""
    for place, family in (("", socket.AF_INET), ("::", socket.AF_INET6)):
        try:
            socket.create_server((place, port), family=family).close()
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # there is no IPv6
                return False
    return True


def find_port(wanted, count):
    """Return wanted, or by default the first port from PORT on, with count free ports from there.

    Raises ValueError, with who has it, if wanted is taken.
    """
    for port in [wanted] if wanted else itertools.count(PORT):
        if all(is_free(port + offset) for offset in range(count)):
            return port
    update_experiment()
    for id, known in Experiments().get_all_experiments().items():
        if known["port"] == wanted and known["status"] != "STOPPED":
            holder = (
                f"experiment {id} ({known['experimentName']}) has it: nnictl stop {id} ends that"
            )
            raise ValueError(f"--port is {wanted}; allowed: a free one; {holder}")
    raise ValueError(f"--port is {wanted}; allowed: a free one, with {count - 1} free after it")


def prepare_environment(config, listen):
    """Set what NNI's manager inherits: this Python for the trials, and manager.js for itself."""
    machines = getattr(config.training_service, "machine_list", None) or []
    found = [socket.getaddrinfo(machine.host, None) for machine in machines]
    guard = {
        "listen": listen,
        "machines": [place[4][0] for places in found for place in places],
        "nodeOptions": os.environ.get("NODE_OPTIONS", ""),
    }
    preload = json.dumps(str(PRELOAD))  # quoted: its path may have spaces
    # NNI's Node, of 2022, stumbles over today's openssl.cnf: then it takes no Ed25519 keys.
    own = f"--openssl-config=/dev/null --require {preload}"
    os.environ["NODE_OPTIONS"] = f"{guard['nodeOptions']} {own}"
    os.environ["NNI_GUARD"] = json.dumps(guard)


def start(experiment, port):
    """Start an experiment and return when its first trial is there, or the patience is over.

    Raises RuntimeError, with the manager's last words, if it fails; then nothing is left of it.
    """
    root = Path(experiment.config.experiment_working_directory)
    folder, latest = root / experiment.id, root / "_latest"
    is_new = not folder.exists()
    before = os.readlink(latest) if latest.is_symlink() else None
    folder.mkdir(0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # also of one to be resumed: NNI lets everybody write below it
    with patience() as started:
        try:
            experiment.start(port, run_mode=RunMode.Detach)
            end = time.monotonic() + PATIENCE
            while not rest.get(port, "/trial-jobs") and time.monotonic() < end:
                status = rest.get(port, "/check-status")
                if status["status"] == "ERROR":
                    raise RuntimeError(f"NNI's tuner: {' '.join(status['errors'])}")
                time.sleep(0.1)
        except BaseException as error:
            for process in started:
                stop(process)
            words = last_words(folder / "log")
            Experiments().update_experiment(experiment.id, "status", "STOPPED")
            if is_new:
                Experiments().remove_experiment(experiment.id)
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                latest.unlink()
                if before:
                    latest.symlink_to(before)
            if isinstance(error, Exception):
                raise RuntimeError(f"the search does not start: {error}: {words}") from error
            raise


def last_words(logs):
    """Return the last lines of the manager's stderr, and the errors in its and the tuner's log."""
    words = []
    for name, pattern in (
        ("nnictl_stderr.log", r"^(?!-+$|Experiment \w+ start|Thrown at:|\s+at ).+"),
        ("nnimanager.log", r".*(?:ERROR|CRITICAL).*"),
        ("dispatcher.log", r".*(?:ERROR|CRITICAL).*"),
    ):
        with contextlib.suppress(OSError):
            text = (logs / name).read_text(encoding="utf-8", errors="replace")
            words += re.findall(pattern, text, re.MULTILINE)[-4:]
    return "\n".join(words)
