"""The kinds of hyperparameters. Each has a default, a meaning, and bounds or choices."""

import json
import math
from dataclasses import dataclass


class NotAllowed(ValueError):
    """A value is not allowed. The message is one line: the key, the value and what is allowed."""


class Hyperparameter:
    """A setting that a search may change. kind is the type of its values."""

    def from_text(self, text):
        """Return a flag's text as this kind. Other text stays as it is, and parse() refuses it."""
        try:
            return self.kind(text)
        except ValueError:
            return text

    def parse(self, value, name):
        """Return a value from JSON as this kind. Raises NotAllowed; name begins the message."""
        if not self.allows(value):
            raise NotAllowed(f"{name} is {value!r}; allowed: {self.allowed}")
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
        try:
            number = self.kind(value)
        except OverflowError:  # an int that is too large for a float
            return False
        return self.above < number < self.below and self.at_least <= number <= self.at_most


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
