"""A trial of a search, and what counts as its result."""

import json
import math
from dataclasses import dataclass, field
from numbers import Real

from nnisearch.shared.text import one_line

ENDED = {"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}
NO_RESULT = "which is no result; allowed: a finite number, or an object whose default is one"
# Exceptions of a value that NNI has not written.
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)
KEYS = ("trial", "id", "status", "result", "reported", "intermediate", "hyperparameters")
KEYS += ("seconds", "last", "area")  # of a trial in JSON


def number(value: object) -> float | None:
    """Return a reported value as a finite float, or None if it is no result.

    The value comes from JSON. A result is a number, a NumPy number (which NNI writes as an array
    without dimensions), or an object whose "default" is one of these.
    """
    if isinstance(value, dict) and "default" in value:
        value = value["default"]
    if isinstance(value, dict) and value.get("shape") == []:
        value = value.get("__ndarray__")
    return finite(value)


def finite(value: object) -> float | None:
    """Return a number as a finite float, else None. As in NNI, true and false are numbers."""
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def read_result(text: object) -> tuple[float | None, str | None]:
    """Return (result, None) from a result's JSON, or (None, its text) if it is no result."""
    try:
        value = json.loads(text)
    except MALFORMED:
        value = text
    result = number(value)
    if result is not None:
        return result, None
    if isinstance(value, dict) and "__nni_obj__" in value:  # as NNI writes it
        return None, "a Python object, such as a tensor"
    return None, one_line(text if isinstance(text, str) else json.dumps(text), 60)


def duration(seconds: float | None) -> float | None:
    """Return seconds, or None if they are negative because the clock was set back."""
    return seconds if seconds is not None and seconds >= 0 else None


@dataclass
class Trial:
    """A trial of a search.

    reported is the text of a reported value that is no result. start is in ms since 1970.
    """

    number: int
    id: str
    status: str = "WAITING"
    result: float | None = None
    reported: str | None = None
    intermediate: list[float | None] = field(default_factory=list)
    hyperparameters: object = field(default_factory=dict)
    seconds: float | None = None
    start: int = 0

    @property
    def has_result(self) -> bool:
        """Whether the trial counts: it has reported a result, and has not failed afterwards."""
        return self.status in ("SUCCEEDED", "EARLY_STOPPED") and self.result is not None

    @property
    def last(self) -> float | None:
        """The last of the intermediate results, or None."""
        return self.intermediate[-1] if self.intermediate else None

    @property
    def area(self) -> float | None:
        """The area under the curve of the intermediate results, of width 1: their mean, or None."""
        values = self.intermediate
        return sum(values) / len(values) if values and None not in values else None

    def as_json(self) -> dict:
        """Return the trial as --json prints it."""
        return {"trial": self.number} | {key: getattr(self, key) for key in KEYS[1:]}

    def title(self) -> str:
        """Return the trial's number and ID as text."""
        return f"trial {self.number} ({one_line(self.id)})"
