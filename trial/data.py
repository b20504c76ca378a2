"""CIFAR-10, downloaded and decoded once for all trials, or synthetic images without a download.

A data set is always four tensors: training images, their labels, test images, their labels. Images
are uint8 (N, 3, 32, 32), labels int64 (N,). For your own data you need hold_out() and save() only.
"""

import contextlib
import fcntl
import io
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F


def as_path(text):
    """Return text, from a flag or the environment, as a path. ~ is the user's home."""
    return Path(os.path.expanduser(text))


def default_folder():
    """Return the folder that CIFAR10_DIR names, or data beside train.py."""
    return as_path(os.environ.get("CIFAR10_DIR") or Path(__file__).resolve().parent.parent / "data")


def load_cifar10(data_dir):
    """Return CIFAR-10, 50,000 and 10,000 images, from this folder. Downloads it if needed.

    The first trial writes a cache file beside the data set. Later trials map this file into memory,
    so they share one copy. If it cannot be written, each trial decodes the data set for itself.
    Raises FileNotFoundError if the data set cannot be loaded; the message says what to do.
    """
    data_dir = data_dir.absolute()
    if data_dir.name == "cifar-10-batches-py" and (data_dir / "data_batch_1").exists():
        data_dir = data_dir.parent  # the user has named the data set, not its folder
    cache = data_dir / "cifar10.pt"
    if tensors := read_cache(cache):
        return tensors
    if cache.exists():
        print(f"{cache} is damaged or not CIFAR-10, and not used", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only folder, or a disk without locks
            data_dir.mkdir(parents=True, exist_ok=True)
            path = Path(f"{cache}.lock")
            can_write = not path.exists() or os.access(path, os.W_OK)
            lock = stack.enter_context(open(path, "a" if can_write else "r"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if tensors := read_cache(cache):  # another trial has made it meanwhile
            return tensors
        for unfinished in data_dir.glob(f"{cache.name}.*.tmp"):  # of killed trials
            shutil.rmtree(unfinished, ignore_errors=True)
        tensors = decode_cifar10(data_dir)
        try:
            save({"tensors": tensors, "checksums": checksums(tensors)}, cache)
        except OSError as error:
            print(f"{error}: this run decodes CIFAR-10 for itself", file=sys.stderr)
    return read_cache(cache) or tensors


def read_cache(cache):
    """Return the tensors in the cache file, mapped into memory; None if it is damaged."""
    try:
        content = torch.load(cache, map_location="cpu", mmap=True, weights_only=True)
        tensors = content["tensors"]
        return tensors if checksums(tensors) == content["checksums"] else None
    except Exception:  # torch.load raises many kinds of errors for a damaged file
        return None


def checksums(tensors):
    """Return the sum of each tensor's bytes as 64-bit integers: 20 ms for CIFAR-10."""
    return [tensor.view(torch.int64).sum().item() for tensor in tensors]


def decode_cifar10(data_dir):
    """Return CIFAR-10 from its batch files. torchvision unpacks or downloads them if needed."""
    # Not at the top: this import takes a second, and trials that find the cache do not need it.
    from torchvision.datasets import CIFAR10

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait forever for a silent server
    try:
        splits = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a fault of the network, the disk or the files
        raise FileNotFoundError(
            f"CIFAR-10 is missing or damaged in {data_dir / CIFAR10.base_folder}\n"
            f"What failed: {type(error).__name__}: {error}\n"
            "It takes 550 MB there, archive and cache included. You can do one of these:\n"
            f"  - put {CIFAR10.filename} from {CIFAR10.url} into {data_dir}\n"
            f"  - point --data-dir or CIFAR10_DIR at a folder that holds {CIFAR10.base_folder}\n"
            "  - try --dataset synthetic, which needs no download"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return [images[0], labels[0], images[1], labels[1]]


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


def save(content, path):
    """Write content with torch.save. Other processes see the old file or the whole new file.

    Raises OSError, with the path and the reason, if the file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save to a file hides why the disk refuses it
    torch.save(content, buffer)
    place = {"prefix": f"{path.name}.", "suffix": ".tmp", "dir": path.absolute().parent}
    try:
        with tempfile.TemporaryDirectory(**place) as folder:
            unfinished = Path(folder, path.name)
            unfinished.write_bytes(buffer.getbuffer())
            os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def can_save(path):
    """Return whether save() may write this path."""
    return os.access(path.absolute().parent, os.W_OK) and (path.is_file() or not path.exists())
