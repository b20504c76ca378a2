"""Tells if a search's manager and tuner live, and the last error of one that has died."""

import contextlib
import re
from datetime import datetime

import psutil

from nnisearch.results.trials import EXPERIMENTS, read_json
from nnisearch.shared.processes import is_tuner, lives, manager_of
from nnisearch.shared.text import THREAD_DIED, one_line, uncoloured


def listed(id):
    """Return an experiment's entry in NNI's list: pid, status, prefixUrl and more, else {}."""
    with contextlib.suppress(OSError, ValueError):  # NNI may be writing it
        return read_json(EXPERIMENTS.expanduser()).get(id, {})
    return {}


class Life:
    """The processes of a search, as far as they are visible here, and their logs."""

    def __init__(self, id, folder):
        self.id, self.logs = id, folder / "log"
        self.manager = self.find_manager()
        self.tuner = None
        self.passes_without = 0  # a tuner
        self.dispatcher = Log(self.logs / "dispatcher.log", 0)
        errors = self.logs / "nnictl_stderr.log"
        # Skip the lines from before a resume.
        self.errors = Log(errors, errors.stat().st_size if errors.exists() else 0)

    def find_manager(self):
        """Return the process of the search's manager, or None if it is not visible here."""
        return manager_of(self.id)

    def is_over(self):
        """Return whether the manager has ended; False if its process was never found."""
        self.manager = self.manager or self.find_manager()
        return self.manager is not None and not lives(self.manager)

    def tuner_is_dead(self):
        """Return whether the tuner's process, or the working thread in it, has ended."""
        if self.manager is None:  # not visible: in another container, for example
            return False
        if self.tuner is None:
            with contextlib.suppress(psutil.Error):
                if "--tuner-command-channel" in self.manager.cmdline():
                    return False  # the tuner is in a user's program that called nni.experiment
                children = self.manager.children(recursive=True)
                found = [child for child in children if is_tuner(child)]
                self.tuner = found[-1] if found else None
        if self.tuner is None:
            self.passes_without += 1
            return self.passes_without > 3
        return not lives(self.tuner) or bool(self.fatal_entries())

    def fatal_entries(self):
        """Return the log entries about the death of the tuner's thread since the last start."""
        self.dispatcher.read_on()
        born = int(self.manager.create_time()) if self.manager else 0
        entries = THREAD_DIED.findall(self.dispatcher.text)
        return [text for t, text in entries if datetime.fromisoformat(t).timestamp() >= born]

    def tuners_end(self):
        """Return a text on what ended the tuner or the assessor; None if it is unknown."""
        entries = self.fatal_entries()
        if not entries:
            return None
        who = "assessor" if re.search(r"self\.assessor\.|Assessor\.", entries[0]) else "tuner"
        last = entries[0].split("Traceback (most recent call last):")[-1]
        lines = [line for line in last.splitlines() if re.match(r"[\w.]+(:|$)", line)]
        return f"the {who} has died: {one_line(lines[0])}" if lines else None

    def last_words(self):
        """Return the last error that the manager or tuner has printed since the start, or None."""
        self.errors.read_on()
        found = re.findall(r"^.*(?:\b|[a-z])(?:[Ee]rror|Exception): \S.*", self.errors.text, re.M)
        # The tuner's lost connection is a result of the manager's end, not the cause.
        causes = [line for line in found if not re.search("Connect call|Connection ?lost", line)]
        return one_line(causes[-1]) if causes else None


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
