"""Tells if a search's manager and tuner live, and the last error of one that has died."""

import contextlib
import re
from datetime import datetime

from nnisearch.results.experiments import read_experiments
from nnisearch.shared.processes import call, is_tuner, lives, manager_of, with_descendants
from nnisearch.shared.text import one_line, reason, uncoloured

# An exception in the tuner's thread. The process may stay afterwards, and do nothing.
THREAD_DIED = re.compile(
    r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] ERROR \(nni\.runtime\.msg_dispatcher_base/Thread"
    r"((?:.*\n(?!\[\d{4}-))*.*)",  # the traceback, up to the next entry
    re.MULTILINE,
)


class Liveness:
    """The processes of a search, as far as they are visible here, and their logs."""

    def __init__(self, id, folder):
        self.id, logs = id, folder / "log"
        self.manager, self.tuner = manager_of(id), None  # None: not visible
        self.passes_without = 0  # a tuner
        self.dispatcher = Log(logs / "dispatcher.log", 0)
        errors = logs / "nnictl_stderr.log"
        # Skip the lines from before a resume.
        self.errors = Log(errors, errors.stat().st_size if errors.exists() else 0)

    def is_over(self):
        """Return whether the manager has ended; False if its process was never visible."""
        self.manager = self.manager or manager_of(self.id)
        return self.manager is not None and lives(self.manager) is False

    def is_stopped(self):
        """Return whether NNI's list says that the search was stopped."""
        with contextlib.suppress(OSError, ValueError):  # NNI may be writing it
            return read_experiments().get(self.id, {}).get("status") == "STOPPED"
        return False

    def tuner_is_dead(self):
        """Return whether the tuner's process, or the working thread in it, has ended."""
        if self.manager is None:  # in another container, for example
            return False
        if self.tuner is None:
            arguments = call(self.manager, "cmdline")
            if arguments is None or "--tuner-command-channel" in arguments:
                return False  # the tuner is in a user's program that called nni.experiment
            family = with_descendants([self.manager])
            family = [process for process in family if lives(process) is not False]
            # A trial may search, too, and have a tuner; that is younger.
            self.tuner = min(filter(is_tuner, family), key=born, default=None)
            if self.tuner is None:
                if all(is_tuner(process) is not None for process in family):  # none is closed
                    self.passes_without += 1
                return self.passes_without > 3
        return lives(self.tuner) is False or bool(self.fatal_entries())

    def fatal_entries(self):
        """Return the log entries about the death of the tuner's thread since the last start."""
        self.dispatcher.read_on()
        start = int(born(self.manager)) if self.manager else 0
        entries = THREAD_DIED.findall(self.dispatcher.text)
        return [text for t, text in entries if datetime.fromisoformat(t).timestamp() >= start]

    def why(self, what, errors=()):
        """Return what has happened to a search, with the logs' last error, or NNI's errors.

        An exception in the tuner or the assessor is named instead of what.
        """
        if entries := self.fatal_entries():
            who = "assessor" if re.search(r"self\.assessor\.|Assessor\.", entries[0]) else "tuner"
            return f"the {who} has died: {reason(entries[0])}"
        self.errors.read_on()
        lines = re.findall(r"^.*(?:\b|[a-z])(?:[Ee]rror|Exception): \S.*", self.errors.text, re.M)
        # The tuner's lost connection is a result of the manager's end, not the cause.
        causes = [line for line in lines if not re.search("Connect call|Connection ?lost", line)]
        words = one_line(causes[-1] if causes else " ".join(errors))
        if "Tuner closed connection" in words:  # this ends NNI's manager
            what, words = "the tuner has died, and NNI's manager with it", ""
        return f"{what}: {words or 'no error message; was it killed?'}"


def born(process):
    """Return when a process has started, in s since 1970; 0 if it cannot be seen."""
    return call(process, "create_time") or 0


class Log:
    """A growing file. read_on() appends its new content to text, and keeps the last KEPT of it."""

    KEPT = 100_000  # characters

    def __init__(self, path, start):
        self.path, self.place, self.text = path, start, ""

    def read_on(self):
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(self.place)
            new = file.read()
            self.place += len(new)
            self.text = uncoloured(self.text + new.decode(errors="replace"))[-self.KEPT :]
