"""Writes files and lines: a file is complete or unchanged, and a closed pipe is no error."""

import argparse
import contextlib
import io
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from nnisearch.shared.text import one_line


class Parser(argparse.ArgumentParser):
    """A command's flags, without abbreviations; an error is one line."""

    def __init__(self, prog: str, description: str | None):
        first = (description or "").partition("\n")[0]  # `python -OO` keeps no docstrings
        super().__init__(prog=prog, description=first, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def as_path(text: str) -> Path:
    """Return the path in a flag; ~ is the home, which no shell expands in --out=~/best.json."""
    if not text:
        raise argparse.ArgumentTypeError("it is ''; allowed: the name of a file")
    return Path(os.path.expanduser(text))


def prepare_output() -> None:
    """Print each line at once, and escape characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not; a closed one is None
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write bytes to a file. It is complete or unchanged, even if the power fails.

    mode is for a new file, before the umask. Raises OSError that names the file.
    """
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if path.exists() and (not path.is_file() or path.parent == Path("/dev")):
            raise OSError("it is no plain file; allowed: a file, or a new name")
        with open(unfinished, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def remove(folder: Path) -> None:
    """Remove a folder as far as possible, read-only folders in it, too."""
    for place, names, _ in os.walk(folder):
        for name in names:
            if not os.path.islink(path := os.path.join(place, name)):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def may_be_closed() -> Iterator[None]:
    """End the command silently once nobody reads its output, as in `… | head -1`."""
    try:
        yield
        if sys.stdout:  # None if the shell has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # Python flushes them at exit
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
