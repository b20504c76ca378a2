"""Tries the tuner and the trial before the search, each in a process as NNI would start it.

If one of them fails, the search is refused in one line. A slow tuner or trial is not refused: after
five seconds a line tells the user what the command waits for.
"""

import contextlib
import ctypes
import importlib
import inspect
import json
import math
import os
import re
import select
import signal
import socket
import sys
import time
from pathlib import Path

from nni.runtime.tuner_command_channel.command_type import CommandType
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from nnisearch.before.config import is_local, shipped_class
from nnisearch.before.gpus import free_gpus
from nnisearch.elsewhere import slurm
from nnisearch.shared.text import THREAD_DIED, last_line, one_line, reason, tail

TUNER_PATIENCE = 120  # s; then the search starts although its tuner has not answered
TRIAL_PATIENCE = 600  # s; the same for the trial, which may have to download its data
QUEUE_PATIENCE = 60  # s; the same for a trial in SLURM's queue, and again on its node
NOTICE = 5  # s until the user is told what the command waits for
RESULTS = 25  # for NNI's tuners; some use their model only after ten or twenty results
RESULTS_PATIENCE = 3  # s for all results
STEPS = 10  # intermediate results per trial, if there is an assessor
MOST_TRIALS = 5  # sets of parameters for a trial that fails; results for nnisearch's tuners
AFTER_ASKING = 2  # s; a trial that still runs so long after reading its parameters is good
# {error of one of NNI's tuners: what it allows}
HINTS = {
    "is not a valid OptimizeMode": "allowed: maximize, minimize",
    r"\{'_name': .*\} is not in list": "allowed for PBT: options that have no parameters",
    "'int' object has no attribute 'is_integer'": "allowed: randint, not a quniform by 1",
}
DISPATCHER = Path(__file__).resolve().parents[1] / "manager" / "dispatcher.py"
IN_OPEN = 0x20  # of inotify(7)


class Waiting:
    """A time limit in seconds. After NOTICE seconds, a line tells what the command waits for."""

    def __init__(self, what, patience):
        self.what, self.patience = what, patience
        self.start = time.monotonic()
        self.is_said = False

    def goes_on(self, words=""):
        """Return whether time is left; words is the last line that was printed so far."""
        seconds = time.monotonic() - self.start
        if seconds > NOTICE and not self.is_said:
            self.is_said = True
            printed = f"; its last line: {words}" if words else ""
            print(f"Waiting for {self.what} (--no-rehearsal skips this){printed}")
        return seconds < self.patience


def rehearse(config, folder, watchdog):
    """Try the tuner and, if trials run on this machine, the trial with the tuner's parameters.

    folder is made for their files; watchdog, a launch.Watchdog, runs them. Raises ValueError with
    the reason if one fails.
    """
    proposals = rehearse_tuner(config, folder / "tuner", watchdog)
    if not proposals or not is_local(config):
        return
    wanted = config.trial_gpu_number
    free = free_gpus(config.training_service) if wanted else []
    if wanted and len(free) < wanted:
        return  # the trial would have to wait
    devices = None  # NNI does not schedule GPUs: the trial sees all
    if wanted is not None:
        devices = ",".join(map(str, free[:wanted])) or "-1"
    for number, proposal in enumerate(proposals):  # a trial may fail with some parameters only
        place = folder / f"trial{number}"
        why, has_asked = rehearse_trial(config, place, proposal, number, devices, watchdog)
        if why is None:
            return
        if not has_asked:
            break
    if has_asked:
        tried = one_line(json.dumps(json.loads(proposals[0])["parameters"]), 300)
        if len(proposals) > 1:
            tried = f"each of {len(proposals)} sets of parameters, such as {tried}"
        why += f"; tried with {tried}; --no-rehearsal starts the search all the same"
    raise ValueError(f"trialCommand is {one_line(config.trial_command, 300)!r}: {why}")


def rehearse_tuner(config, folder, watchdog):
    """Return the tuner's first sets of parameters, in the format of NNI's parameter.cfg.

    NNI's dispatcher runs the tuner and the assessor, or the advisor. This process plays NNI's
    manager: it gives the dispatcher the same command and environment. Raises ValueError if the
    dispatcher ends before it has answered.
    """
    algorithms = config.json()
    space = algorithms.pop("searchSpace")
    limit = config.max_trial_number or math.inf
    number = min(config.trial_concurrency, limit)
    folder.mkdir(parents=True)
    with (
        Manager() as manager,
        (folder / "output").open("w") as output,
        watchdog.running(
            [sys.executable, DISPATCHER, str(manager.other.fileno())],
            cwd=folder,
            env=os.environ | dispatcher_environment(config, folder),
            stdout=output,
            stderr=output,
            pass_fds=[manager.other.fileno()],
        ) as tuner,
    ):
        log = folder / "dispatcher.log"

        def has_ended():
            return tuner.poll() is not None or bool(THREAD_DIED.search(read(log)))

        manager.begin(algorithms, has_ended)
        try:
            manager.send(CommandType.Initialize, as_javascript(space))
            proposals = manager.request_parameters(number)
            with contextlib.suppress(TimeoutError):
                rehearse_results(manager, config, proposals, limit)
        except TimeoutError:
            return []
        except EOFError:
            why = reason(read(folder / "output") + read(log))
            hint = with_hint(why, config)
            raise ValueError(f"{algorithms_in_words(config)}: {hint}") from None
    return proposals[:MOST_TRIALS]


def rehearse_results(manager, config, proposals, limit):
    """Send results to the tuner and the assessor; append the tuner's next parameters to proposals.

    Some tuners fail only after several results. A user's own tuner gets none, because it might
    store them. Raises EOFError if the tuner ends, TimeoutError if it takes too long.
    """
    shipped = shipped_class(config.tuner) or ""
    count = MOST_TRIALS if shipped else 0
    if shipped.startswith("nni."):
        count = RESULTS + (config.tuner.class_args or {}).get("population_size", 0)
    has_assessor = bool(config.assessor and config.assessor.name)
    manager.waiting = Waiting("the tuner's next parameters", RESULTS_PATIENCE)
    ended = 0
    while ended < min(count, len(proposals)):
        for command, data in events(proposals[ended], ended, has_assessor):
            manager.send(command, data)
        ended += 1
        if len(proposals) < limit:
            proposals += manager.request_parameters(1)
    # If all trials were proposed, the last result ends the search, so the tuner may fail then.
    if len(proposals) < limit and manager.has_ended():
        raise EOFError


def as_javascript(value):
    """Return a JSON value as NNI's manager passes it on: JavaScript writes 1.0 as 1."""

    def number(text):
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.loads(json.dumps(value), parse_float=number)


def read(path):
    """Return the end of a file, "" if it does not exist yet."""
    return tail(path) if path.exists() else ""


def with_hint(why, config):
    """Return why a tuner or an assessor has failed, and what is allowed if that is known."""
    hints = [hint for pattern, hint in HINTS.items() if re.search(pattern, why)]
    for kind in ("tuner", "assessor"):
        algorithm = getattr(config, kind)
        class_name = shipped_class(algorithm, kind) if algorithm else None
        module, _, name = (class_name or "").rpartition(".")
        if name and f"{name}.__init__() got an unexpected keyword argument" in why:
            allowed = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            hints.append(f"allowed in classArgs: {', '.join(allowed)}")
    return "; ".join([why, *hints, "--no-rehearsal starts the search all the same"])


def algorithms_in_words(config):
    """Return a text that names a configuration's tuner and assessor."""
    words = []
    for kind in ("tuner", "assessor"):
        if algorithm := getattr(config, kind):
            arguments = f" with {algorithm.class_args}" if algorithm.class_args else ""
            words.append(f"{kind} is {algorithm.name or algorithm.class_name}{arguments}")
    return one_line(", ".join(words), 300)


def dispatcher_environment(config, folder):
    """Return the variables that NNI's manager sets for the dispatcher."""
    return {
        "SDK_PROCESS": "dispatcher",
        "NNI_MODE": "start",
        "NNI_CHECKPOINT_DIRECTORY": str(folder),
        "NNI_LOG_DIRECTORY": str(folder),
        "NNI_LOG_LEVEL": config.log_level,
        "NNI_INCLUDE_INTERMEDIATE_RESULTS": "false",
        "NNI_TUNER_COMMAND_CHANNEL": "ws://localhost/tuner",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, config.tuner_gpu_indices or [])),
    }


def events(proposal, number, has_assessor):
    """Yield NNI's (command, data) pairs for the results and the end of one trial."""
    trial = {"trial_job_id": f"rehearsal{number}"}
    metric = trial | {"parameter_id": json.loads(proposal)["parameter_id"]}
    result = 0.618 * (number + 1) % 1  # all different, between 0 and 1
    for step in range(STEPS if has_assessor else 0):
        value = json.dumps(result * (1 - 0.5 ** (step + 1)))
        report = {"type": "PERIODICAL", "sequence": step, "value": value}
        yield CommandType.ReportMetricData, metric | report
    report = {"type": "FINAL", "sequence": 0, "value": json.dumps(result)}
    yield CommandType.ReportMetricData, metric | report
    yield CommandType.TrialEnd, trial | {"event": "SUCCEEDED", "hyper_params": proposal}


class Manager:
    """Plays NNI's manager: own is the manager's end of a web socket, other is the dispatcher's."""

    def __enter__(self):
        self.own, self.other = socket.socketpair()
        self.protocol = ServerProtocol(max_size=None)
        self.part, self.received = b"", []  # an incomplete message, and complete ones
        return self

    def __exit__(self, *_):
        self.own.close()
        self.other.close()

    def begin(self, config, has_ended):
        """Send the configuration to the running dispatcher; has_ended() tells if the tuner died."""
        self.has_ended = has_ended
        self.waiting = Waiting("the tuner's first parameters", TUNER_PATIENCE)
        self.other.close()
        self.write(json.dumps(config).encode() + b"\n")

    def write(self, data):
        with contextlib.suppress(OSError):  # the dispatcher has ended, which read_on() notices
            self.own.sendall(data)

    def send(self, command, data):
        """Send a command, once the dispatcher has connected. Raises what read_on() does."""
        while self.protocol.state is State.CONNECTING:
            self.read_on()
        if self.protocol.state is State.OPEN:
            self.protocol.send_text(command.value + json.dumps(data).encode())
            self.write(b"".join(self.protocol.data_to_send()))

    def read_on(self):
        """Read for 0.1 s. Raises EOFError if the tuner has ended, TimeoutError after the limit."""
        if not self.waiting.goes_on():
            raise TimeoutError
        if not select.select([self.own], [], [], 0.1)[0]:
            if self.has_ended():
                raise EOFError
            return
        try:
            data = self.own.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            if isinstance(event, Request):
                self.protocol.send_response(self.protocol.accept(event))
            elif event.opcode in (Opcode.TEXT, Opcode.CONT):
                self.part += event.data
                if event.fin:
                    self.received.append(self.part.decode())
                    self.part = b""
        self.write(b"".join(self.protocol.data_to_send()))

    def request_parameters(self, number):
        """Return number sets of parameters, as JSON, or fewer if the tuner has no more."""
        self.send(CommandType.RequestTrialJobs, number)
        proposals = []
        while len(proposals) < number:
            while not self.received:
                self.send(CommandType.Ping, "")  # lets a dispatcher end if its worker has died
                self.read_on()
            message = self.received.pop(0)
            kind, data = message[:2].encode(), message[2:]
            if kind == CommandType.NewTrialJob.value:
                proposals.append(data)
            if kind == CommandType.NoMoreTrialJobs.value:
                break
        return proposals


def rehearse_trial(config, folder, proposal, number, devices, watchdog):
    """Run the trial command until it reports, ends, or has had its parameters for AFTER_ASKING s.

    Returns the reason for a failure, or None, and whether the trial has read its parameters. number
    counts the trials from 0; devices is the trial's CUDA_VISIBLE_DEVICES, or None.
    """
    (folder / ".nni").mkdir(parents=True)
    parameters, metrics = folder / "parameter.cfg", folder / ".nni" / "metrics"
    parameters.write_text(proposal, encoding="utf-8")
    metrics.touch()
    given = {
        "NNI_PLATFORM": "local",
        "NNI_EXP_ID": "rehearsal",
        "NNI_SYS_DIR": str(folder),
        "NNI_TRIAL_JOB_ID": folder.name,
        "NNI_OUTPUT_DIR": str(folder),
        "NNI_TRIAL_SEQ_ID": str(number),
        "NNI_CODE_DIR": str(config.trial_code_directory),
    }
    if devices is not None:
        given["CUDA_VISIBLE_DEVICES"] = devices
    if uses_slurm := slurm.is_used(config):
        given["SLURM_JOB_NAME"] = slurm.job_name(watchdog.folder.name, folder.name)
        (folder / slurm.NOTE).touch()
    output, errors = folder / "stdout", folder / "stderr"
    script = folder / "run.sh"  # ps would show passwords among arguments
    script.write_text(config.trial_command, encoding="utf-8")
    with (
        noticing_opening(parameters) as was_opened,
        output.open("w") as stdout,
        errors.open("w") as stderr,
        watchdog.running(
            ["bash", script],
            cwd=config.trial_code_directory,
            env=os.environ | given,
            stdout=stdout,
            stderr=stderr,
        ) as trial,
    ):
        if uses_slurm and not leaves_queue(trial, folder, watchdog.folder.name, errors):
            return None, True
        patience = QUEUE_PATIENCE if uses_slurm else TRIAL_PATIENCE
        waiting = Waiting("the trial to read its parameters", patience)
        asked = None  # the time when it has read its parameters
        while trial.poll() is None:
            if not waiting.goes_on(last_line(errors) or last_line(output)):
                return None, was_opened()
            if metrics.stat().st_size:
                return None, True
            if asked is None and was_opened():
                asked = time.monotonic()
            if asked and time.monotonic() - asked > AFTER_ASKING:
                return None, True
            time.sleep(0.05)
        has_asked = was_opened()
        if trial.returncode == 0:
            return None, has_asked
    words = tail(errors) or tail(output)
    if uses_slurm and (lost := re.search(slurm.LOST, words, re.M)):
        print(f"The search starts although its trial could not be tried: {one_line(lost[0])}")
        return None, has_asked
    status = trial.returncode
    if status < 0 or 128 < status < 128 + signal.NSIG:  # bash was killed, or a command in it
        how = f"it was ended by signal {abs(status) % 128}"
    else:
        how = f"it fails with status {status}"
    return f"{how}: {reason(words)}", has_asked


def leaves_queue(trial, folder, id, errors):
    """Wait until a trial's job has started on a node or has ended; return whether it has.

    After QUEUE_PATIENCE seconds, a line says that the search starts without trying the trial.
    """
    waiting = Waiting("the trial, which is in SLURM's queue", QUEUE_PATIENCE)
    while waiting.goes_on(last_line(errors)):
        if trial.poll() is not None or (folder / slurm.NOTE).read_text():
            return True
        time.sleep(0.1)
    state = slurm.queue(id).get(slurm.job_name(id, folder.name), "no state is known")
    print(f"The search starts although its trial is still in SLURM's queue: {state}")
    return False


@contextlib.contextmanager
def noticing_opening(path):
    """Yield a function that returns whether a process has opened the file, by inotify(7)."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    libc.inotify_add_watch(watch, os.fsencode(path), IN_OPEN)
    try:
        yield lambda: bool(select.select([watch], [], [], 0)[0])
    finally:
        os.close(watch)
