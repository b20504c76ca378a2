"""Turns text of other programs into one safe line, and finds errors in it."""

import re
from pathlib import Path

# The line that srun prints for each task that ends, after the task's own output.
SRUNS_END = re.compile(r"srun: error: .*: (Exited with exit code \d+|Terminated|Killed)$")

# A terminal's escape sequences for colours and cursor movement (ECMA-48).
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


def uncoloured(text: str) -> str:
    """Return a text without a terminal's escape sequences."""
    return ESCAPES.sub("", text)


# NAME=VALUE, --name VALUE, "name": VALUE and name is VALUE, for names of secrets; and the user and
# password in a URL.
WORDS = "password|passwd|passphrase|secret|credential|token"
NAME = rf"[\w-]{{0,40}}(?:(?i:{WORDS})|[a-z]Key|[_-](?i:key))"
SECRET = re.compile(
    rf"""({NAME}["']?(?:\s*[:=]\s*|\s+is\s+(?!not?\b))|--{NAME}\s+)"""
    r"""(?:'[^']*'|"[^"]*"|[^\s,;}'"]+)|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"""
)


def one_line(text: object, longest: int = 1000) -> str:
    """Return a text or an exception's message as one printable line, without passwords.

    A line of more than longest characters loses its middle: the end often gives the reason.
    """
    words = uncoloured(str(text)).split()
    if not words and isinstance(text, Exception):
        words = [type(text).__name__]
    line = "".join(char if char.isprintable() else "?" for char in " ".join(words))
    line = SECRET.sub(lambda secret: f"{secret[1] or ''}***", line)
    if len(line) <= longest:
        return line
    start = longest // 3
    return f"{line[:start]}...{line[start + 3 - longest :]}"


def tail(path: Path, size: int = 100_000) -> str:
    """Return the last size bytes of a file as text. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        return file.read().decode(errors="replace")


def reason(text: str) -> str:
    """Return the line of a process's output that tells why it failed.

    This is the end of the last traceback, or a later line with an error, or else the last line.
    """
    lines = uncoloured(text).splitlines()
    cause = -1
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last):"):
            later = range(number + 1, len(lines))
            ends = [n for n in later if lines[n] and lines[n] == lines[n].strip()]
            cause = ends[0] if ends else cause
        elif re.search(r"(\b|[a-z])([Ee]rror|Exception): \S", line) and not SRUNS_END.match(line):
            cause = number
    printed = [line for line in lines if line.strip()]
    printed = [line for line in printed if not SRUNS_END.match(line)] or printed
    if not printed:
        return "it has printed nothing"
    line = one_line(lines[cause] if cause >= 0 else printed[-1])
    if re.fullmatch(r"\w+", line) and cause > 0:  # an exception without a message: show its code
        code = [text for text in lines[:cause] if text.strip(" ^~")]
        line = f"{line}: {one_line(code[-1])}"
    return line
