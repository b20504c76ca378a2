"""The images: CIFAR-10, downloaded and decoded once for all trials, or a stand-in without download.

What it returns is always four tensors: training images, their labels, test images, their labels;
images uint8 (N, 3, 32, 32), labels int64 (N,). What is read has been checked, and what cannot be
had is explained, with the ways on.
"""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import files

DATASETS = ("cifar10", "synthetic")
SHAPES = [(50_000, 3, 32, 32), (50_000,), (10_000, 3, 32, 32), (10_000,)]  # of CIFAR-10
PRIVATE = "cifar10.download."  # how the name of a folder to download and unpack in begins


def default_data_dir():
    """Return the folder that CIFAR10_DIR names, or data beside this file."""
    return Path(os.environ.get("CIFAR10_DIR") or Path(__file__).resolve().parent / "data")


def load_cifar10(data_dir):
    """Return CIFAR-10, of 50,000 and 10,000 images, from the folder that has or gets its files.

    It comes from a cache file beside the data set, which the first trial makes and all later ones
    map into memory, so that they share one copy. Raises FileNotFoundError, with the ways on, if the
    data set is neither there nor to be downloaded, and OSError if the cache cannot be written.
    """
    data_dir = data_dir.absolute()
    if data_dir.name == "cifar-10-batches-py" and (data_dir / "data_batch_1").exists():
        data_dir = data_dir.parent  # the data set itself was named, not the folder that it is in
    cache = data_dir / "cifar10.pt"
    if cache.is_file():  # to open a fifo would wait for who writes to it
        if tensors := read_cache(cache):
            return tensors
        print(f"{cache} is damaged or not CIFAR-10, and not used", file=sys.stderr)
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = files.acquire_lock(cache)
    except OSError as problem:
        print(f"{problem}, so this run decodes CIFAR-10 for itself", file=sys.stderr)
        return decode_cifar10(data_dir)
    with lock:
        if tensors := read_cache(cache):  # made by another trial while this one waited for the lock
            return tensors
        # What trials left that were killed, at save() or while they unpacked. Another user's stays.
        for unfinished in data_dir.glob(f"{cache.name}.*.tmp"):
            with contextlib.suppress(OSError):
                unfinished.unlink()
        for private in data_dir.glob(f"{PRIVATE}*"):
            shutil.rmtree(private, ignore_errors=True)
        tensors = decode_cifar10(data_dir)
        files.save({"tensors": tensors, "checksums": checksums(tensors)}, cache, tensors)
    return read_cache(cache) or tensors


def read_cache(cache):
    """Return the tensors in the cache file, mapped into memory, or None if it is of no use."""
    try:
        content = torch.load(cache, map_location="cpu", mmap=True, weights_only=True)
        tensors = content["tensors"]
        kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        is_cifar10 = kinds == list(zip(SHAPES, [torch.uint8, torch.int64] * 2, strict=True))
        is_cifar10 &= all(labels.min() >= 0 and labels.max() <= 9 for labels in tensors[1::2])
        return tensors if is_cifar10 and checksums(tensors) == content["checksums"] else None
    except Exception:  # what torch.load raises depends on what is damaged
        return None


def checksums(tensors):
    """Return each tensor's sum as 64-bit integers: a check of all of CIFAR-10 in 20 ms."""
    return [tensor.view(torch.int64).sum().item() for tensor in tensors]


def decode_cifar10(data_dir):
    """Return what load_cifar10 does, from the batch files, which are unpacked first if need be."""
    # Not at the top: it takes a second, which a trial that finds the cache need not wait.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    batches = data_dir / CIFAR10.base_folder
    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    files = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    missing = [name for name, md5 in files if not check_integrity(batches / name, md5)]
    try:
        if missing:
            unpack_cifar10(data_dir / CIFAR10.filename, batches)
        splits = [CIFAR10(data_dir, train=train) for train in (True, False)]
    except Exception as error:  # of the network, the disk or the data: the message says which
        free = shutil.disk_usage(data_dir).free / 1e6
        raise FileNotFoundError(
            f"CIFAR-10 cannot be loaded. Missing or damaged in {batches}: {', '.join(missing)}\n"
            f"What failed: {type(error).__name__}: {error}\n"
            f"It takes 550 MB there, archive and cache included; {free:.0f} MB are free.\n"
            "Three ways on:\n"
            f"  - put {CIFAR10.filename} from {CIFAR10.url} into {data_dir}\n"
            f"  - point --data-dir or CIFAR10_DIR at a folder that holds {CIFAR10.base_folder}\n"
            "  - try --dataset synthetic, which needs no download"
        ) from error
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return [images[0], labels[0], images[1], labels[1]]


def unpack_cifar10(archive, batches):
    """Fill the folder batches from the archive, which is downloaded if it is missing or damaged.

    torchvision writes through links that others may have put there, so it works in a private
    folder, which goes in the end, and whole files are moved from it. Raises OSError, and what
    torchvision does.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    if batches.is_symlink():
        raise OSError(f"{batches} is a link, and nothing is written to where it leads")
    # Seconds. torchvision's download sets no limit and would wait for ever for a silent server.
    socket.setdefaulttimeout(30)
    with tempfile.TemporaryDirectory(prefix=PRIVATE, dir=archive.parent) as private:
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
    images = []
    for some in torch.arange(len(labels)).split(1000):  # all at once would take 600 MB of floats
        part = windows[labels[some], :, top[some], left[some]]
        part = part + 0.7 * windows[others[some], :, other_top[some], other_left[some]]
        part += 2.5 * torch.randn(part.shape, generator=generator)
        images.append(part.mul_(32).add_(128).clamp_(0, 255).byte())
    images = torch.cat(images)
    return [images[:10_000], labels[:10_000], images[10_000:], labels[10_000:]]


def hold_out(images, labels):
    """Return training data with the last tenth of each class held out, to validate on, as tests.

    Of CIFAR-10's training images that is 500 of each class.
    """
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        indices = (labels == label).nonzero()
        is_held_out[indices[len(indices) * 9 // 10 :]] = True
    return [images[~is_held_out], labels[~is_held_out], images[is_held_out], labels[is_held_out]]
