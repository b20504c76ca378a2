"""What others have written, made fit for a line on the terminal."""

import re

# An exception in the thread that serves the tuner: after it the process may stay, and do nothing.
THREAD_DIED = re.compile(
    r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] ERROR \(nni\.runtime\.msg_dispatcher_base/Thread"
    r"((?:.*\n(?!\[\d{4}-))*.*)",  # with the traceback, up to the next entry
    re.MULTILINE,
)

# What srun says of each task that ends, after the task's own words.
SRUNS_END = re.compile(r"srun: error: .*: (Exited with exit code \d+|Terminated|Killed)$")

# What colours a text on a terminal, or moves the cursor there (ECMA-48).
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


def uncoloured(text):
    """Return a text without a terminal's escape sequences."""
    return ESCAPES.sub("", text)


# NAME=VALUE, --name VALUE, "name": VALUE and name is VALUE, by names of what opens something; and
# the user and password of an address.
WORDS = "password|passwd|passphrase|secret|credential|token"
NAME = rf"[\w-]{{0,40}}(?:(?i:{WORDS})|[a-z]Key|[_-](?i:key))"
SECRET = re.compile(
    rf"""({NAME}["']?(?:\s*[:=]\s*|\s+is\s+(?!not?\b))|--{NAME}\s+)"""
    r"""(?:'[^']*'|"[^"]*"|[^\s,;}'"]+)|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"""
)


def one_line(text, longest=1000):
    """Return a text, or what an exception says, in one printable line, without passwords.

    Of a line longer than that many characters the middle is left out: its end often says why.
    """
    words = uncoloured(str(text)).split()
    if not words and isinstance(text, Exception):
        words = [type(text).__name__]
    line = "".join(char if char.isprintable() else "?" for char in " ".join(words))
    line = SECRET.sub(lambda found: f"{found[1] or ''}***", line)
    if len(line) <= longest:
        return line
    start = longest // 3
    return f"{line[:start]}...{line[start + 3 - longest :]}"


def tail(path, size=100_000):
    """Return the last bytes of a file as text. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        return file.read().decode(errors="replace")


def last_line(path):
    """Return the last line that has been written to a file, made fit to be shown, or ""."""
    lines = tail(path, 1000).strip().splitlines()
    return one_line(lines[-1]) if lines else ""


def reason(text):
    """Return the line of what a process has printed that says why it failed.

    That is the end of its last traceback, or a later line that speaks of an error, or its last.
    """
    lines = uncoloured(text).splitlines()
    found = -1
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last):"):
            ends = [n for n in range(number + 1, len(lines)) if lines[n].strip() == lines[n] != ""]
            found = ends[0] if ends else found
        elif re.search(r"(\b|[a-z])([Ee]rror|Exception): \S", line) and not SRUNS_END.match(line):
            found = number
    said = [line for line in lines if line.strip()]
    if not said:
        return "it has printed nothing"
    line = one_line(lines[found] if found >= 0 else said[-1])
    if re.fullmatch(r"\w+", line) and found > 0:  # an exception without words: what raised it
        code = [text for text in lines[:found] if text.strip(" ^~")]
        line = f"{line}: {one_line(code[-1])}"
    return line
