"""Watches the first moments of a search, in which most mistakes show.

A search whose tuner fails, or whose first trials show that no trial can work, is not worth its
time. The start then fails, and its watchdog stops and removes the search.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import struct
import threading
import time

from nni.experiment import rest

from nnisearch.before.config import shipped_class
from nnisearch.results.database import DATABASE, Trials
from nnisearch.results.trials import ENDED, NO_RESULT
from nnisearch.shared.processes import call, own_processes
from nnisearch.shared.text import one_line, reason, tail
from nnisearch.watch.liveness import Liveness

NOTICE = 5  # s until the user is told what the command waits for
PATIENCE = 600  # s; then the search goes on although no trial has read its parameters
AFTER_ASKING = 3  # s; a trial that still runs so long after it has read its parameters is good
UNSEEN = 10  # s; the same for a trial that waits, or whose reading cannot be seen
START = 0.2  # s that a trial needs at least to start Python and read its parameters
FIRST = 5  # trials; a trial may fail with some parameters only
IN_ACCESS, IN_CREATE = 0x1, 0x100  # of inotify(7)
EVENT = struct.Struct("iIII")  # inotify(7): watch, what has happened, cookie, length of the name


def watch(config, folder, port, logs, readers, only_tuner):
    """Wait until the first trials of a started search show that it works, or wait themselves.

    Returns the trials if they wait, for example for a GPU. logs is a logs.Logs, readers what
    noticing_readers() has yielded. With only_tuner, wait only until the tuner has proposed a trial.
    Raises ValueError, in one line, if the tuner or the trials cannot work.
    """
    liveness, begun, is_said = Liveness(folder.name, folder), time.monotonic(), False
    first = FirstTrials(config, folder, readers)
    while time.monotonic() - begun < PATIENCE:
        status = check_tuner(port, liveness, logs)
        first.update()
        if only_tuner and status != "INITIALIZED" and first.trials.by_id:
            return []
        if not only_tuner and first.are_good(status):
            return []
        if first.waits:
            return first.earliest()
        if not is_said and time.monotonic() - begun > NOTICE:
            is_said = True
            print(f"Waiting for {first.awaited()}; --keep-going does not wait")
        time.sleep(0.05)
    return []


def check_tuner(port, liveness, logs):
    """Return the status of a search. Raises ValueError if its tuner or its manager has failed."""
    try:
        status = rest.get(port, "/check-status")
    except OSError as error:
        status = {"status": "ERROR" if liveness.is_over() else "SILENT", "errors": [error]}
    if status["status"] == "ERROR" or liveness.fatal_entries():
        raise ValueError(logs.explain(status["errors"]))
    return status["status"]


class FirstTrials:
    """The first trials of a search.

    readers is {ID: when the trial has read its parameters}, which grows; None if it is unknown.
    """

    def __init__(self, config, folder, readers):
        self.config, self.folder, self.readers = config, folder, readers
        self.trials = Trials(folder / DATABASE)
        self.running = {}  # ID: when the trial was first seen to run
        self.changed = self.waiting = time.monotonic()  # last change; since when all have waited
        self.waits = False  # whether all have waited for so long that the search may go on

    def update(self):
        """Read what the trials have done."""
        now, changed = time.monotonic(), []
        with contextlib.suppress(OSError):  # NNI has not made it yet, or writes it
            changed = self.trials.update()
        if changed:
            self.changed = now
        for trial in changed:
            if trial.status == "RUNNING":
                self.running.setdefault(trial.id, now)
        statuses = {trial.status for trial in self.trials.by_id.values()}
        if statuses != {"WAITING"}:
            self.waiting = now
        self.waits = now - self.waiting > UNSEEN

    def earliest(self):
        return sorted(self.trials.by_id.values(), key=lambda trial: trial.number)[:FIRST]

    def are_good(self, status):
        """Return whether a trial shows that the search works.

        Raises ValueError if a trial shows that it does not. status is NNI's of the search.
        """
        first = self.earliest()
        for trial in first:
            self.check(trial)
        number = min(FIRST, self.config.max_trial_number or FIRST)
        is_quiet = time.monotonic() - self.changed > AFTER_ASKING
        if status == "DONE" or (status == "TUNER_NO_MORE_TRIAL" and is_quiet):
            number = len(first)  # the tuner has proposed fewer
        failed = [trial for trial in first if trial.status == "FAILED" and not is_reported(trial)]
        if first and len(failed) == number:
            tried = one_line(json.dumps(first[0].hyperparameters), 300)
            self.refuse(first[0], f"the first {number} trials fail, such as with {tried}")
        return any(map(self.is_good, first))

    def check(self, trial):
        """Raise ValueError if a trial shows that no trial can work."""
        is_odd = trial.reported and not re.search("NaN|Infinity", trial.reported)
        if is_odd and shipped_class(self.config.tuner):  # a user's own may know what to do with it
            self.refuse(trial, f"a trial reports {trial.reported}, {NO_RESULT}")
        if self.readers is None or trial.id in self.readers or is_reported(trial):
            return
        if trial.status == "FAILED":
            self.refuse(trial, "a trial fails before it reads its parameters")
        if trial.status == "SUCCEEDED":
            self.refuse(trial, "a trial ends without reading its parameters, and without a report")

    def is_good(self, trial):
        """Return whether a trial shows that trials can work."""
        if is_reported(trial) or trial.status in ENDED:
            return trial.status != "FAILED" or is_reported(trial)
        if self.readers is None:
            return time.monotonic() - self.running.get(trial.id, float("inf")) > UNSEEN
        is_late = time.monotonic() - self.readers.get(trial.id, float("inf")) > AFTER_ASKING
        return is_late and has_process(trial.id)

    def refuse(self, trial, what):
        """Raise ValueError that says in one line what a trial does, with the trial's own error."""
        why = reason(self.printed(trial))
        command = one_line(self.config.trial_command, 300)
        hint = "--keep-going starts the search all the same"
        raise ValueError(f"trialCommand is {command!r}: {what}: {why}; {hint}")

    def printed(self, trial):
        """Return the end of what a trial has printed, on stdout if there is nothing on stderr."""
        folder = self.folder / "trials" / trial.id
        with contextlib.suppress(OSError):
            return tail(folder / "stderr").strip() or tail(folder / "stdout").strip()
        return ""

    def awaited(self):
        """Return in words what the first trials have not done yet."""
        first = self.earliest()
        if not first:
            return "the tuner's first parameters"
        if not self.running:
            return "a trial to start"
        lines = self.printed(first[0]).splitlines()
        what = "a trial to read its parameters, or to report"
        return f"{what}; the last line of the first: {one_line(lines[-1])}" if lines else what


def has_process(id):
    """Return whether a process of a trial runs; on a busy machine NNI notices its end late."""
    environments = (call(process, "environ") or {} for process in own_processes())
    return any(environment.get("NNI_TRIAL_JOB_ID") == id for environment in environments)


def is_reported(trial):
    """Return whether a trial has reported something."""
    return bool(trial.intermediate) or trial.result is not None or trial.reported is not None


@contextlib.contextmanager
def noticing_readers(trials):
    """Yield {ID: when} of the trials that have read their parameters, while the block runs.

    Yields None where inotify(7) is at its limit. trials is the folder of the trials' folders, and
    is made.
    """
    trials.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None)
    notify = libc.inotify_init1(os.O_CLOEXEC)
    if notify < 0 or libc.inotify_add_watch(notify, os.fsencode(trials), IN_CREATE) < 0:
        yield None
        return
    readers, folders, is_over = {}, {}, threading.Event()

    def watch_trial(name):
        is_late = False
        watch = libc.inotify_add_watch(notify, os.fsencode(trials / name), IN_ACCESS)
        folders[watch] = name
        # Assume that the trial has read them, if inotify is at its limit or the watch comes late.
        with contextlib.suppress(OSError):  # the trial starts only now
            started = (trials / name / "stdout").stat().st_mtime
            is_late = time.time() - started > START
        if watch < 0 or is_late:
            readers[name] = time.monotonic() + UNSEEN - AFTER_ASKING

    def note():
        while not is_over.is_set():
            if not select.select([notify], [], [], 0.1)[0]:
                continue
            for watch, happened, name in events(os.read(notify, 1 << 16)):
                if happened & IN_CREATE:
                    watch_trial(name)
                elif name == "parameter.cfg":
                    readers.setdefault(folders[watch], time.monotonic())

    # A thread, because a trial may read them a few milliseconds after its folder was made.
    thread = threading.Thread(target=note)
    thread.start()
    try:
        yield readers
    finally:
        is_over.set()
        thread.join()
        os.close(notify)


def events(data):
    """Yield (watch, what has happened, name of the file) of the bytes that inotify gives."""
    while data:
        watch, happened, _, length = EVENT.unpack_from(data)
        end = EVENT.size + length
        yield watch, happened, os.fsdecode(data[EVENT.size : end].rstrip(b"\0"))
        data = data[end:]
