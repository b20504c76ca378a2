"""Tells if an experiment's manager runs on another machine or container with the same HOME."""

import contextlib
import json
import os
import platform
import sqlite3
from pathlib import Path

import psutil

from nnisearch.shared.text import one_line

# Mount options that hide this machine's locks from others.
OWN_LOCKS = {"nolock", "local_lock=all", "local_lock=posix", "nobrl", "localflock"}


def namespace(pid="self"):
    """Return a process's PID namespace (each container has one); "" if unknown."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def elsewhere(folder):
    """Return where an experiment's manager runs, and what to do, if it runs elsewhere; else None.

    place.js notes in the experiment's folder where the manager runs, and holds a lock there.
    """
    try:
        note = json.loads((folder / "manager.json").read_text())
        host, boot, pids = note["host"], note["boot"], note["namespace"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it has ended, or was started by nnictl
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    this_boot = boot_file.read_text().strip() if boot_file.exists() else platform.node()
    if (boot, pids) == (this_boot, namespace()):
        return None  # it is here, where other code looks for its process
    is_other_machine = boot != this_boot and host != platform.node()
    if not is_locked(folder / "manager.lock") and not (is_other_machine and has_own_locks(folder)):
        return None
    where = f"on {host}" if is_other_machine else f"in another container of this machine, {host}"
    advice = f"watch or stop it there; if that is gone: rm '{folder}'/manager.*"
    return one_line(f"it runs {where}: {advice}")


def is_locked(path):
    """Return whether a process on any machine holds SQLite's lock on a file."""
    if not path.exists():
        return False
    try:
        address = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error:  # the file is locked, or the file system has no locks
        return True
    return False


def has_own_locks(folder):
    """Return whether a folder's mount hides this machine's locks from others."""
    folder = folder.resolve()
    known = psutil.disk_partitions(all=True)
    mounts = [mount for mount in known if folder.is_relative_to(mount.mountpoint)]
    mounts.sort(key=lambda mount: len(mount.mountpoint))  # the last one holds the folder
    return any(m.fstype.startswith("fuse") or OWN_LOCKS & {*m.opts.split(",")} for m in mounts[-1:])
