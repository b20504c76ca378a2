"""Tells if an experiment's manager runs on another machine or container with the same HOME.

store.js notes in the experiment's folder where the manager runs, and holds a lock there meanwhile.
"""

import contextlib
import json
import os
import platform
import sqlite3
from pathlib import Path

from nnisearch.shared.text import one_line


def namespace(pid: int | str = "self") -> str:
    """Return a process's PID namespace (each container has one); "" if unknown."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def runs_on_other_host(folder: Path) -> str | None:
    """Return a line that says where else an experiment's manager runs; None if it does not.

    folder is the experiment's.
    """
    try:
        note = json.loads((folder / "manager.json").read_text())
        host, boot, container = note["host"], note["boot"], note["namespace"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it has ended, or was started by nnictl
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    this_boot = boot_file.read_text().strip() if boot_file.exists() else platform.node()
    if (boot, container) == (this_boot, namespace()):
        return None  # it is here, where other code looks for its process
    # Another machine's lock may be invisible here. This machine may have been started anew.
    is_this_machine = boot == this_boot or host == platform.node()
    if is_this_machine and not is_locked(folder / "manager.lock"):
        return None
    gone = f"if {host} is gone: rm '{folder}'/manager.*"
    return one_line(f"it runs on {host}; continue there, or, {gone}")


def is_locked(path: Path) -> bool:
    """Return whether a process holds SQLite's lock on a file."""
    try:
        address = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error:
        return path.exists()
    return False
