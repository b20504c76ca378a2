"""Starts NNI's manager on a free port; a failed start leaves nothing behind."""

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from nni.experiment import RunMode, rest

from nnisearch.before.config import is_local
from nnisearch.shared.output import remove
from nnisearch.shared.place import runs_on_other_host
from nnisearch.shared.processes import end, manager_of, managers, processes_of, stop
from nnisearch.shared.signals import uninterrupted
from nnisearch.shared.text import one_line, uncoloured
from nnisearch.start import resume
from nnisearch.start.patches import PATIENCE, Experiments, StartLock, patience

PORT = 8090
PRELOAD = Path(__file__).resolve().parent.parent / "manager" / "load.js"
UNDO = Path(__file__).with_name("undo.py")


def is_free(port):
    """Return whether no process on this machine listens on the port."""
    for place, family in (("", socket.AF_INET), ("::", socket.AF_INET6)):
        try:
            socket.create_server((place, port), family=family).close()
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # there is no IPv6
                return False
    return True


def are_free(port, count):
    """Return whether this port and the next count - 1 are free."""
    return all(is_free(port + offset) for offset in range(count))


def find_port(wanted, count):
    """Return the first of count consecutive free ports: wanted or, by default, PORT or above.

    Raises ValueError if wanted is taken; it names the experiment that has it.
    """
    for port in [wanted] if wanted else itertools.count(PORT):
        if are_free(port, count):
            return port
    alive = managers()
    for id, known in Experiments().get_all_experiments().items():
        if known.get("port") == wanted and id in alive:
            name = one_line(known.get("experimentName"))
            holder = f"experiment {id} ({name}) has it: nnictl stop {id} ends that"
            raise ValueError(f"--port is {wanted}; allowed: a free one; {holder}")
    after = ", and the next one free" if count > 1 else ""
    raise ValueError(f"--port is {wanted}; allowed: a free one{after}")


def prepare_environment(config, listen, elsewhere=None):
    """Set the environment of NNI's manager, so that Node loads load.js with its settings."""
    guard = {
        "listen": listen,
        "machines": [],
        "elsewhere": elsewhere,
        "nodeOptions": os.environ.get("NODE_OPTIONS", ""),
    }
    preload = re.sub(r'(["\\])', r"\\\1", str(PRELOAD))
    options, debuggers = re.subn(r"(?<!\S)--inspect(-brk)?(=\S*)?(?!\S)", "", guard["nodeOptions"])
    if debuggers:
        reach = "all users of this machine could run commands by it"
        print(f"NODE_OPTIONS has --inspect; NNI's manager starts without that debugger: {reach}")
    # NNI's Node of 2022 misreads today's openssl.cnf, and then refuses Ed25519 keys.
    os.environ["NODE_OPTIONS"] = f'--require "{preload}" {options} --openssl-config=/dev/null'
    os.environ["NNI_GUARD"] = json.dumps(guard)


@contextlib.contextmanager
def experiment_folder(experiment):
    """Create the experiment's folder, and yield a Watchdog for what is started there.

    Removes the folder if a new search fails to start. Raises OSError if it cannot be created.
    """
    folder = Path(experiment.config.experiment_working_directory, experiment.id)
    made = [parent for parent in folder.parents if not parent.exists()]
    # NNI creates folders in it that everybody may write to, and runs files from them.
    for parent in reversed([folder, *made]):
        parent.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    with Watchdog(folder, experiment._action) as watchdog:  # it also guards the removal
        try:
            yield watchdog
        except BaseException:
            if experiment._action == "create":
                with uninterrupted():
                    remove(folder)
                    with contextlib.suppress(OSError):  # another search may use a parent, too
                        for parent in made:
                            parent.rmdir()
            raise


def launch(experiment, wanted, watchdog):
    """Start an experiment on a port, wanted or the first free one; return the port.

    Waits for the first trial, at most PATIENCE seconds. Raises ValueError if the port is taken, and
    RuntimeError with the manager's last errors if the start fails.
    """
    config = experiment.config
    uses_runners = not is_local(config) or config.training_service.reuse_mode
    count = 2 if uses_runners else 1  # runners report to the next port
    logs = {path: path.stat().st_size for path in watchdog.folder.glob("log/*.log")}
    port = None
    with patience() as started:
        try:
            with contextlib.ExitStack() as stack:
                lock = Path("~/nni-experiments/.nnisearch.lock").expanduser()
                lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # One start at a time: two at once could choose the same port.
                with StartLock(lock):
                    if experiment._action != "create":
                        resume.clear(experiment)
                    port = find_port(wanted, count)
                    if not wanted and port != PORT:
                        print(f"Port {PORT} is taken; {port} is the next free one")
                    stack.enter_context(watchdog.starting())
                    experiment.start(port, run_mode=RunMode.Detach)
                listed = Experiments()
                if experiment.id not in listed.get_all_experiments():
                    raise OSError("NNI's list of experiments cannot be written: is the disk full?")
                listed.update_experiment(experiment.id, "webuiUrl", [f"http://127.0.0.1:{port}"])
                if experiment._action != "view":
                    wait_for_trial(port)
        except Exception as error:
            if port and not wanted and not are_free(port, count):
                return launch(experiment, wanted, watchdog)  # another user has just taken the port
            if not started:  # no process of NNI has caused it
                raise
            words = "; ".join([one_line(error), *last_words(watchdog.folder / "log", logs)])
            raise RuntimeError(f"the search does not start: {words}") from error
    return port


class Watchdog:
    """Undoes a start that fails. If this process is killed, undo.py does that in its place.

    undo.py reads a pipe from this process. The pipe closes even at kill -9, and its last line tells
    what to undo.
    """

    def __init__(self, folder, action):
        self.folder, self.action, self.doing = folder, action, "wait"

    def __enter__(self):
        command = [sys.executable, UNDO, self.folder, self.action]
        with uninterrupted():  # in a new session, because Ctrl-C does not reach that
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, *_):
        with uninterrupted():
            if not self.doing.startswith("run"):  # otherwise undo.py ends what an interruption left
                self.tell("done")
            with contextlib.suppress(OSError):
                self.process.communicate()

    def tell(self, line):
        self.doing = line
        with contextlib.suppress(OSError):  # undo.py has been killed
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    @contextlib.contextmanager
    def running(self, command, **how):
        """Run a command in a session of its own; end it and its children after the block."""
        how |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
        with uninterrupted():
            process = subprocess.Popen(command, **how)
            self.tell(f"run {process.pid}")
        try:
            yield process
        finally:
            with uninterrupted():
                stop(process.pid, self.folder)
                process.wait()
                self.tell("wait")

    @contextlib.contextmanager
    def starting(self):
        """Undo the start of NNI's manager in the block if the block fails."""
        latest = read_latest(self.folder)
        self.tell(f"start {latest}")
        try:
            yield
        except BaseException:
            with uninterrupted():
                undo(self.folder, self.action, latest)
                self.tell("wait")
            raise


def read_latest(folder):
    """Return the ID in NNI's link to its latest experiment, or ""."""
    latest = folder.with_name("_latest")
    return os.readlink(latest) if latest.is_symlink() else ""


def undo(folder, action, latest):
    """End the processes of a start, and restore NNI's list and NNI's link to the latest experiment.

    folder is the experiment's; latest is what read_latest() returned before the start. The
    experiment is removed from the list if action is "create", and marked as stopped otherwise.
    """
    id = folder.name
    if manager := manager_of(id):
        stop(manager.pid, folder)
    end(processes_of(id, folder))
    if action == "create":
        Experiments().remove_experiment(id)
    elif not runs_on_other_host(folder):  # another machine may just have resumed it
        Experiments().update_experiment(id, "status", "STOPPED")
    if read_latest(folder) == id:
        folder.with_name("_latest").unlink()
        if latest:
            folder.with_name("_latest").symlink_to(latest)


def wait_for_trial(port):
    """Wait at most PATIENCE seconds until a search has its first trial or has ended.

    Raises RuntimeError if its tuner fails.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not rest.get(port, "/trial-jobs"):
        status = rest.get(port, "/check-status")
        if status["status"] == "ERROR":
            raise RuntimeError(f"NNI's tuner: {' '.join(status['errors'])}")
        if "NO_MORE_TRIAL" in status["status"]:
            return
        time.sleep(0.1)


def last_words(folder, sizes):
    """Return the last lines of the manager's stderr, and the last errors in NNI's two logs.

    sizes is {path: bytes} of what an earlier start has written there.
    """
    words = []
    for name, pattern in (
        ("nnictl_stderr.log", r"^(?!-+$|Experiment \w+ start|Thrown at:|\s+at ).+"),
        ("nnimanager.log", r".*(?:ERROR|CRITICAL).*"),
        ("dispatcher.log", r".*(?:ERROR|CRITICAL).*"),
    ):
        with contextlib.suppress(OSError):
            path = folder / name
            text = uncoloured(path.read_bytes()[sizes.get(path, 0) :].decode(errors="replace"))
            words += map(one_line, re.findall(pattern, text, re.MULTILINE)[-4:])
    return words
