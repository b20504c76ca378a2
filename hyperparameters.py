"""What a hyperparameter is, and what is said where a value is not allowed."""

import contextlib
import json
import math
from dataclasses import dataclass


class NotAllowed(ValueError):
    """A value that is not allowed: one line that names key, value and what is allowed."""


class Hyperparameter:
    """A value by which a training is done; kind is its type."""

    kind = str

    def from_text(self, text):
        """Return the text of a flag as this kind, or as it is, to be refused."""
        try:
            return self.kind(text)
        except ValueError:
            return text


@dataclass(frozen=True)
class Number(Hyperparameter):
    """A hyperparameter that is a finite number within bounds."""

    default: float
    meaning: str
    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    kind = float
    noun = "a finite number"

    @property
    def allowed(self):
        """What is allowed, in words: "a finite number >= 0 and < 1"."""
        bounds = {">": self.above, ">=": self.at_least, "<": self.below, "<=": self.at_most}
        words = [f"{sign} {bound}" for sign, bound in bounds.items() if math.isfinite(bound)]
        return f"{self.noun} {' and '.join(words)}".rstrip()

    def accepts(self, value):
        """Return whether value, of this kind, is within the bounds."""
        return self.above < value < self.below and self.at_least <= value <= self.at_most


class Integer(Number):
    """A hyperparameter that is an integer within bounds."""

    kind = int
    noun = "an integer"


@dataclass(frozen=True)
class Choice(Hyperparameter):
    """A hyperparameter that is one of several words."""

    default: str
    meaning: str
    choices: tuple  # or a dict, of which the keys are allowed

    @property
    def allowed(self):
        """What is allowed, in words: "SGD, Adam, AdamW"."""
        return ", ".join(self.choices)

    def accepts(self, value):
        """Return whether value is one of the choices."""
        return value in self.choices


def read(path):
    """Return the hyperparameters in a JSON file: an object of them, or as choose.py writes it.

    Raises NotAllowed if the file is not JSON, and OSError if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotAllowed(f"--params is {path}; allowed: a JSON file; {error}") from error
    return values.get("hyperparameters", values) if isinstance(values, dict) else values


@contextlib.contextmanager
def limited_by_memory(args):
    """Raise NotAllowed, naming batch_size, where the device has too little memory for a training.

    torch raises a RuntimeError for that, of which only the words tell it from any other.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "allocate memory", "alloc_failed")
        words = str(error).lower()
        if not isinstance(error, MemoryError) and not any(sign in words for sign in signs):
            raise
        allowed = f"as many images as {args.device} has memory for"
        problem = str(error).partition("\n")[0]
        message = f"batch_size is {args.batch_size}; allowed: {allowed}; {problem}"
        raise NotAllowed(message) from error
