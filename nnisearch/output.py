"""What a command gives out: files whole or not at all, and lines that somebody still reads."""

import argparse
import contextlib
import os
import secrets
import signal
import sys

from nnisearch.text import one_line


class Parser(argparse.ArgumentParser):
    """A command's flags, each to be written out in full; an error is one line."""

    def __init__(self, prog, description):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message):
        """Exit with status 2 and the message."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def write(path, content):
    """Write bytes to the file, whole or not at all. Raises OSError, naming the file."""
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)  # a pipe or /dev/stdout, in whose place no file may come
            return
        file = open(unfinished, "xb")  # noqa: SIM115 - x: no link that another has put there
        try:
            with file:
                file.write(content)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def may_be_closed():
    """End the command without a word once nobody reads what it prints, as in `… | head -1`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes them again when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
