"""Reads the examples in README.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def examples(path, language):
    """Return the blocks of code in this language, in the order in which the document has them."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.M)
