"""CIFAR-10, downloaded and decoded once for all trials, or synthetic images without a download.

A data set is always four tensors: training images, their labels, test images, their labels. Images
are uint8 (N, 3, 32, 32), labels int64 (N,). For your own data you need hold_out() and save() only.

Several trials or users may share the folder of the files. So files are checked before use, and one
process at a time writes them. No process sees a half-written file.
"""

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

DATASETS = ("cifar10", "synthetic")
SHAPES = [(50_000, 3, 32, 32), (50_000,), (10_000, 3, 32, 32), (10_000,)]  # of CIFAR-10
DOWNLOADS = "cifar10.download."  # prefix of the names of temporary folders
NOTICE_AFTER = 10  # seconds of waiting for another process


def as_path(text):
    """Return text, from a flag or the environment, as a path. ~ is the user's home."""
    return Path(os.path.expanduser(text))


def default_folder():
    """Return the folder that CIFAR10_DIR names, or data beside train.py."""
    return as_path(os.environ.get("CIFAR10_DIR") or Path(__file__).resolve().parent.parent / "data")


def load_cifar10(data_dir):
    """Return CIFAR-10, 50,000 and 10,000 images, from this folder. Downloads it if needed.

    The first trial writes a cache file beside the data set. Later trials map this file into memory,
    so they share one copy. Raises FileNotFoundError if the data set is not there and cannot be
    downloaded; the message says what to do. Raises OSError if the cache cannot be written.
    """
    data_dir = data_dir.absolute()
    if data_dir.name == "cifar-10-batches-py" and (data_dir / "data_batch_1").exists():
        data_dir = data_dir.parent  # the user has named the data set, not its folder
    cache = data_dir / "cifar10.pt"
    if tensors := read_cache(cache):
        return tensors
    if cache.is_file():
        print(f"{cache} is damaged or not CIFAR-10, and not used", file=sys.stderr)
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(cache)
    except OSError as problem:
        print(f"{problem}, so this run decodes CIFAR-10 for itself", file=sys.stderr)
        return decode_cifar10(data_dir)
    with lock:
        if tensors := read_cache(cache):  # another trial has made it meanwhile
            return tensors
        # Killed trials have left these. Files of other users cannot be removed: they stay.
        for unfinished in data_dir.glob(f"{cache.name}.*.tmp"):
            with contextlib.suppress(OSError):
                unfinished.unlink()
        for unfinished in data_dir.glob(f"{DOWNLOADS}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        tensors = decode_cifar10(data_dir)
        save({"tensors": tensors, "checksums": checksums(tensors)}, cache, tensors)
    return read_cache(cache) or tensors


def read_cache(cache):
    """Return the tensors in the cache file, mapped into memory; None if they are not CIFAR-10."""
    try:
        # Another user may have put a fifo there, even after a check of the path. Opening a fifo
        # would wait for a writer. O_PATH finds a file and does not open it.
        place = os.open(cache, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                return None
            found = f"/proc/self/fd/{place}"  # the file that was checked
            content = torch.load(found, map_location="cpu", mmap=True, weights_only=True)
        finally:
            os.close(place)
        tensors = content["tensors"]
        kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        is_cifar10 = kinds == list(zip(SHAPES, [torch.uint8, torch.int64] * 2, strict=True))
        is_cifar10 &= all(labels.min() >= 0 and labels.max() <= 9 for labels in tensors[1::2])
        return tensors if is_cifar10 and checksums(tensors) == content["checksums"] else None
    except Exception:  # torch.load raises many kinds of errors for a damaged file
        return None


def checksums(tensors):
    """Return the sum of each tensor's bytes as 64-bit integers: 20 ms for CIFAR-10."""
    return [tensor.view(torch.int64).sum().item() for tensor in tensors]


def decode_cifar10(data_dir):
    """Return CIFAR-10 from its batch files. Unpacks or downloads the files if needed."""
    # Not at the top: this import takes a second, and trials that find the cache do not need it.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    batches = data_dir / CIFAR10.base_folder
    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    needed = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    missing = [name for name, md5 in needed if not check_integrity(batches / name, md5)]
    try:
        if missing:
            unpack_cifar10(data_dir / CIFAR10.filename, batches)
        splits = [CIFAR10(data_dir, train=train) for train in (True, False)]
    except Exception as error:  # a fault of the network, the disk or the files
        free = shutil.disk_usage(data_dir).free / 1e6
        raise FileNotFoundError(
            f"CIFAR-10 cannot be loaded. Missing or damaged in {batches}: {', '.join(missing)}\n"
            f"What failed: {type(error).__name__}: {error}\n"
            f"It takes 550 MB there, archive and cache included; {free:.0f} MB are free.\n"
            "You can do one of these:\n"
            f"  - put {CIFAR10.filename} from {CIFAR10.url} into {data_dir}\n"
            f"  - point --data-dir or CIFAR10_DIR at a folder that holds {CIFAR10.base_folder}\n"
            "  - try --dataset synthetic, which needs no download"
        ) from error
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return [images[0], labels[0], images[1], labels[1]]


def unpack_cifar10(archive, batches):
    """Fill the folder batches from the archive. Downloads a missing or damaged archive first.

    Other users may have put links there, and torchvision writes through links. So torchvision gets
    a private temporary folder, and whole files are moved from there. Raises OSError and
    torchvision's errors.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    if batches.is_symlink():
        raise OSError(f"{batches} is a link: its target is not written to")
    # In seconds. torchvision sets no limit, and would wait forever for a silent server.
    socket.setdefaulttimeout(30)
    with tempfile.TemporaryDirectory(prefix=DOWNLOADS, dir=archive.parent) as private:
        is_there = check_integrity(archive, CIFAR10.tgz_md5)
        if is_there:
            shutil.copy(archive, private)
        download_and_extract_archive(
            CIFAR10.url, private, filename=archive.name, md5=CIFAR10.tgz_md5
        )
        if not is_there:
            os.replace(Path(private, archive.name), archive)
        batches.mkdir(exist_ok=True)
        for file in Path(private, batches.name).iterdir():
            os.replace(file, batches / file.name)


def make_synthetic():
    """Return 10,000 training and 2,000 test images that look like noise but can be learned.

    They are the same on every machine. Each class has a smooth random texture. An image is a random
    window of its class's texture, plus a fainter window of another class's texture, plus noise.
    """
    generator = torch.Generator().manual_seed(0)
    textures = torch.randn(10, 3, 8, 8, generator=generator)
    textures = F.interpolate(textures, size=(48, 48), mode="bicubic")
    windows = textures.unfold(2, 32, 1).unfold(3, 32, 1)  # (class, channel, top, left, 32, 32)
    labels = torch.arange(12_000) % 10
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    top, left, other_top, other_left = torch.randint(17, (4, len(labels)), generator=generator)
    images = []
    for some in torch.arange(len(labels)).split(1000):  # all at once would take 600 MB
        part = windows[labels[some], :, top[some], left[some]]
        part = part + 0.7 * windows[others[some], :, other_top[some], other_left[some]]
        part += 2.5 * torch.randn(part.shape, generator=generator)
        images.append(part.mul_(32).add_(128).clamp_(0, 255).byte())
    images = torch.cat(images)
    return [images[:10_000], labels[:10_000], images[10_000:], labels[10_000:]]


def hold_out(images, labels):
    """Split training data: hold out the last tenth of each class, in place of test data.

    Returns four tensors, as load_data(). CIFAR-10 has 4,500 + 500 training images per class.
    """
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        indices = (labels == label).nonzero()
        is_held_out[indices[len(indices) * 9 // 10 :]] = True
    return [images[~is_held_out], labels[~is_held_out], images[is_held_out], labels[is_held_out]]


def acquire_lock(file):
    """Wait until no other process writes the file; return a lock. close() releases the lock.

    Raises OSError, with the reason in one line, if the file cannot be written or locked.
    """
    check_is_regular(file)
    if not os.access(file.parent, os.W_OK):
        raise OSError(f"{file.parent} is read-only")
    path = f"{file}.lock"
    try:
        # Another user may have put a link or a file there: neither is written to.
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb", 0)
        owner = os.fstat(lock.fileno()).st_uid
        with contextlib.suppress(KeyError):  # a container does not know the host's users
            owner = pwd.getpwuid(owner).pw_name
        line = f"waiting for another process, which has locked {path}, a file of user {owner}"
        notice = threading.Timer(NOTICE_AFTER, print, [line], {"file": sys.stderr})
        notice.start()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            notice.cancel()
    except OSError as error:  # such as ENOLCK: a network file system without locks
        raise OSError(f"{path} cannot be locked ({error.strerror})") from error
    try:
        check_is_regular(file)  # again: another user may have put something there meanwhile
    except OSError:
        lock.close()
        raise
    return lock


def check_is_regular(file):
    """Raise OSError if the path exists and is not a regular file, but a fifo or a folder."""
    if file.exists() and not file.is_file():
        raise OSError(f"{file} is not a regular file")


def save(content, path, tensors):
    """Write content with torch.save. Other processes see the old file or the whole new file.

    tensors are those in content. Raises OSError if the file cannot be written; the message says how
    much space the tensors need and how much is free.
    """
    if path.exists() and not path.is_file():  # such as /dev/null: never replace it
        raise OSError(f"cannot write {path}: it is not a regular file")
    # "x" writes new files only: never to a file or link that another user has put there.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        if isinstance(error.__context__, (SystemExit, KeyboardInterrupt)):  # torch hides it
            raise error.__context__ from None
        unfinished.unlink(missing_ok=True)  # first: the message below says how much is free
        needed = sum(tensor.nbytes for tensor in tensors) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        room = f"it takes {needed:.1f} MB, and {free:.1f} MB are free"
        raise OSError(f"cannot write {path}: {room}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
