"""The images: CIFAR-10, downloaded and decoded once for all trials, or a stand-in without download.

What it returns is always four tensors: training images, their labels, test images, their labels;
images uint8 (N, 3, 32, 32), labels int64 (N,). What is read has been checked; what cannot be had is
explained, with the ways on; a file is written whole or not at all.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

DATASETS = ("cifar10", "synthetic")


def default_data_dir():
    """Return the folder that CIFAR10_DIR names, or data beside this file."""
    return Path(os.environ.get("CIFAR10_DIR") or Path(__file__).resolve().parent / "data")


def load_cifar10(data_dir):
    """Return CIFAR-10, of 50,000 and 10,000 images.

    It comes from a cache file beside the data set, which the first trial makes and all later ones
    map into memory, so that they share one copy. Raises FileNotFoundError, with the ways on, if the
    data set is neither there nor to be downloaded, and OSError if the cache cannot be written.
    """
    cache = data_dir / "cifar10.pt"
    if tensors := read_cache(cache):
        return tensors
    data_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(data_dir, os.W_OK):
        print(f"{data_dir} is read-only, so this run decodes CIFAR-10 for itself", file=sys.stderr)
        return decode_cifar10(data_dir)
    with FileLock(f"{cache}.lock"):
        if tensors := read_cache(cache):  # made by another trial while this one waited for the lock
            return tensors
        for unfinished in data_dir.glob(f"{cache.name}.*.tmp"):  # a trial was killed at save()
            unfinished.unlink()
        tensors = decode_cifar10(data_dir)
        save({"tensors": tensors, "checksums": checksums(tensors)}, cache, tensors)
    return read_cache(cache) or tensors


def read_cache(cache):
    """Return the tensors in the cache file, mapped into memory, or None if missing or damaged."""
    if not cache.exists():
        return None
    try:
        content = torch.load(cache, mmap=True, weights_only=True)
        if checksums(content["tensors"]) == content["checksums"]:
            return content["tensors"]
    except Exception:  # what torch.load raises depends on what is damaged
        pass
    print(f"{cache} is damaged and not used", file=sys.stderr)
    return None


def checksums(tensors):
    """Return each tensor's sum as 64-bit integers: a check of all of CIFAR-10 in 20 ms."""
    return [tensor.view(torch.int64).sum().item() for tensor in tensors]


def save(content, path, tensors):
    """Write content, which holds the tensors, with torch.save: readers see the old file or the new.

    Raises OSError, naming the file, what it needs and what is free, if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk
        unfinished.unlink(missing_ok=True)  # it takes of what is free
        needed = sum(tensor.nbytes for tensor in tensors) / 1e6
        free = shutil.disk_usage(path.absolute().parent).free / 1e6
        room = f"it takes {needed:.1f} MB, and {free:.1f} MB are free"
        raise OSError(f"cannot write {path}: {room}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def decode_cifar10(data_dir):
    """Return what load_cifar10 does, from torchvision, which verifies or downloads the data set."""
    # Not at the top: it takes a second, which a trial that finds the cache need not wait.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    # Seconds. torchvision's download sets no limit and would wait for ever for a silent server.
    socket.setdefaulttimeout(30)
    try:
        splits = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # of the network, the disk or the data: the message says which
        folder = data_dir.absolute() / CIFAR10.base_folder
        files = [*CIFAR10.train_list, *CIFAR10.test_list]
        files.append((CIFAR10.meta["filename"], CIFAR10.meta["md5"]))
        missing = [name for name, md5 in files if not check_integrity(folder / name, md5)]
        free = shutil.disk_usage(data_dir).free / 1e6
        raise FileNotFoundError(
            f"CIFAR-10 cannot be loaded. Missing or damaged in {folder}: {', '.join(missing)}\n"
            f"What failed: {type(error).__name__}: {error}\n"
            f"It takes 550 MB there, archive and cache included; {free:.0f} MB are free.\n"
            "Three ways on:\n"
            f"  - put {CIFAR10.filename} from {CIFAR10.url} into {data_dir.absolute()}\n"
            f"  - point --data-dir or CIFAR10_DIR at a folder that holds {CIFAR10.base_folder}\n"
            "  - try --dataset synthetic, which needs no download"
        ) from error
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return [images[0], labels[0], images[1], labels[1]]


def make_synthetic():
    """Return a stand-in for CIFAR-10, of 10,000 and 2,000 images, the same for everyone.

    A class is a smooth random texture; an image is a window of it at a random place, under a
    fainter window of another class and under noise.
    """
    generator = torch.Generator().manual_seed(0)
    textures = torch.randn(10, 3, 8, 8, generator=generator)
    textures = F.interpolate(textures, size=(48, 48), mode="bicubic")
    windows = textures.unfold(2, 32, 1).unfold(3, 32, 1)  # (class, channel, top, left, 32, 32)
    labels = torch.arange(12_000) % 10
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    top, left, other_top, other_left = torch.randint(17, (4, len(labels)), generator=generator)
    images = windows[labels, :, top, left] + 0.7 * windows[others, :, other_top, other_left]
    images += 2.5 * torch.randn(images.shape, generator=generator)
    images = images.mul_(32).add_(128).clamp_(0, 255).byte()
    return [images[:10_000], labels[:10_000], images[10_000:], labels[10_000:]]


def hold_out(images, labels):
    """Return training data with the last tenth of each class held out, to validate on, as tests.

    Of CIFAR-10's training images that is 500 of each class.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero()
        held[places[len(places) * 9 // 10 :]] = True
    return [images[~held], labels[~held], images[held], labels[held]]
