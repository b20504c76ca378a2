"""The kinds of hyperparameters. Each has a default, a meaning, and bounds or choices."""

import argparse
import json
import math
import sys
from dataclasses import dataclass


class NotAllowed(ValueError):
    """A value is not allowed. The message is one line: the key, the value and what is allowed."""


class Hyperparameter:
    """A setting that a search may change. kind is the type of its values."""

    @property
    def flag(self):
        """What argparse needs for a flag: a dict. argparse checks a default only if it is text."""
        words = f"{self.meaning} ({self.allowed}; default: {self.default})".replace("%", "%%")
        default = str(self.default)
        return {"type": self.from_text, "default": default, "metavar": "VALUE", "help": words}

    def from_text(self, text):
        """Return a flag's text as this kind of value. Raises argparse's error."""
        try:
            return self.parse(self.kind(text), "")
        except ValueError:
            message = f"{text!r} is not allowed; allowed: {self.allowed}"
            raise argparse.ArgumentTypeError(message) from None

    def parse(self, value, name):
        """Return a value from JSON as this kind. Raises NotAllowed; name begins the message."""
        if not self.allows(value):
            is_rounded = self.kind is int and isinstance(value, float)  # as NNI's quniform does
            hint = " (randint in a search space)" if is_rounded else ""
            raise NotAllowed(f"{name} is {value!r}; allowed: {self.allowed}{hint}")
        return self.kind(value)


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

    def allows(self, value):
        """Return whether value is of this kind and within the bounds. An integer is a number."""
        if isinstance(value, bool) or not isinstance(value, (int, self.kind)):
            return False  # for Python, True is an int
        if abs(value) > sys.float_info.max:  # an integer of hundreds of digits
            return False
        return self.above < value < self.below and self.at_least <= value <= self.at_most


class Integer(Number):
    """A hyperparameter that is an integer within bounds."""

    kind = int
    noun = "an integer"


@dataclass(frozen=True)
class Choice(Hyperparameter):
    """A hyperparameter that is one of several values of one type, such as words."""

    default: object
    meaning: str
    choices: tuple  # or a dict, whose keys are allowed

    @property
    def kind(self):
        """The type of the values."""
        return type(self.default)

    @property
    def allowed(self):
        """What is allowed, in words: "SGD, Adam, AdamW"."""
        return ", ".join(map(str, self.choices))

    def allows(self, value):
        """Return whether value is one of the choices."""
        return type(value) is self.kind and value in self.choices


def read(path):
    """Return the hyperparameters in a JSON file. choose.py writes them under "hyperparameters".

    Raises NotAllowed if the file is not JSON, and OSError if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotAllowed(f"--params is {path}; allowed: a JSON file; {error}") from error
    return values.get("hyperparameters", values) if isinstance(values, dict) else values
