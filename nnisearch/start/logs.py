"""Finds in the logs of NNI's manager and tuner why a search does not start."""

import contextlib
import importlib
import inspect
import re

from nnisearch.before.config import shipped_class
from nnisearch.shared.text import one_line, reason, uncoloured

TRACEBACK = "Traceback (most recent call last):"
STDERR, MANAGER, TUNER = "nnictl_stderr.log", "nnimanager.log", "dispatcher.log"


class Logs:
    """What the manager and the tuner of an experiment have written since this object was made."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder / "log"
        self.sizes = {path: path.stat().st_size for path in self.folder.glob("*.log")}

    def read(self, name):
        """Return what is new in a log, "" if there is none."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            return uncoloured(path.read_bytes()[self.sizes.get(path, 0) :].decode(errors="replace"))
        return ""

    def explain(self, errors):
        """Return in one line why a search fails; errors are what its start has met."""
        if end := self.tuners_end():
            return end
        words = [*errors]
        for name, pattern in (
            (STDERR, r"^(?!Experiment \w+ start|Thrown at:|\s+at ).+"),
            (MANAGER, r".*(?:ERROR|CRITICAL).*"),
            (TUNER, r".*(?:ERROR|CRITICAL).*"),
        ):
            words += re.findall(pattern, self.read(name), re.MULTILINE)[-4:]
        return "; ".join(map(one_line, words))

    def tuners_end(self):
        """Return a line on the exception that has ended the tuner or the assessor, or ""."""
        for name in (TUNER, STDERR):
            _, begin, text = self.read(name).rpartition(TRACEBACK)
            if begin:
                why = reason(begin + text.partition("\nError: ")[0])  # then Node's lines follow
                return "; ".join([f"{self.algorithms()}: {why}", *self.hints(why)])
        if re.search("Tuner closed connection|tuner's process has ended", self.read(STDERR)):
            return f"{self.algorithms()}: the process has ended without an error message"
        return ""

    def algorithms(self):
        """Return a text that names the configuration's tuner and assessor."""
        words = []
        for kind in ("tuner", "assessor"):
            if algorithm := getattr(self.config, kind):
                arguments = f" with {algorithm.class_args}" if algorithm.class_args else ""
                words.append(f"{kind} is {algorithm.name or algorithm.class_name}{arguments}")
        return one_line(", ".join(words), 300)

    def hints(self, why):
        """Return what is allowed, if a class of NNI or nnisearch has refused its classArgs."""
        if "is not a valid OptimizeMode" in why:
            return ["allowed: maximize, minimize"]
        for kind in ("tuner", "assessor"):
            algorithm = getattr(self.config, kind)
            shipped = shipped_class(algorithm, kind) if algorithm else None
            module, _, name = (shipped or "").rpartition(".")
            if name and f"{name}.__init__() got an unexpected keyword argument" in why:
                arguments = inspect.signature(getattr(importlib.import_module(module), name))
                return [f"allowed in classArgs: {', '.join(arguments.parameters)}"]
        return []
