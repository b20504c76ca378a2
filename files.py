"""Files in folders that several trials or users share: written whole, and by one at a time."""

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import sys
import threading

import torch

PATIENCE = 10  # seconds to wait for another process before saying so


def acquire_lock(file):
    """Wait until no other process makes the file; return a lock, whose closing lets others do so.

    Raises OSError, with the reason in one line, where neither the file nor a lock is to be had.
    """
    if file.exists() and not file.is_file():
        raise OSError(f"{file} is not a regular file")
    if not os.access(file.parent, os.W_OK):
        raise OSError(f"{file.parent} is read-only")
    path = f"{file}.lock"
    try:
        # A link that others have put there is not followed, and no file's content is touched.
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb", 0)
        owner = os.fstat(lock.fileno()).st_uid
        with contextlib.suppress(KeyError):  # in a container, users of the host have no names
            owner = pwd.getpwuid(owner).pw_name
        line = f"waiting for another process, which has locked {path}, a file of user {owner}"
        notice = threading.Timer(PATIENCE, print, [line], {"file": sys.stderr})
        notice.start()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            notice.cancel()
    except OSError as error:  # such as ENOLCK, from a network's file system without locks
        raise OSError(f"{path} cannot be locked ({error.strerror})") from error
    return lock


def save(content, path, tensors):
    """Write content, which holds the tensors, with torch.save: readers see the old file or the new.

    Raises OSError, naming the file, what it needs and what is free, if it cannot be written.
    """
    if path.exists() and not path.is_file():  # /dev/null, say, would be replaced for everyone
        raise OSError(f"cannot write {path}: it is not a regular file")
    # "x" writes to new files only, so not to one, or through a link, that others have put there.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk
        if isinstance(error.__context__, (SystemExit, KeyboardInterrupt)):  # torch's last words
            raise error.__context__ from None
        unfinished.unlink(missing_ok=True)  # or it would count as used space in the message
        needed = sum(tensor.nbytes for tensor in tensors) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        room = f"it takes {needed:.1f} MB, and {free:.1f} MB are free"
        raise OSError(f"cannot write {path}: {room}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
