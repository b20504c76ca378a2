"""Prepares images for the network: as floats, augmented for training, as views for --tta."""

import contextlib

import torch
import torch.nn.functional as F

from trial import processes
from trial.hyperparameters import NotAllowed


def make(images, labels, index, pixels):
    """Return the images with these indices as the network takes them, and their labels.

    images: uint8 (N, channels, height, width), labels: int64 (N,), index: int64 (n,). Returns
    floats (n, channels, height, width) and int64 (n,). If pixels is not 0, the images are
    augmented. If several processes train together, each gets its share of the batch.
    """
    chosen = processes.own_share(index)
    inputs = normalize(images.index_select(0, chosen))  # images[chosen] is slower
    if pixels:
        inputs = augment(inputs, pixels, len(index))
    return inputs, labels.index_select(0, chosen)


def normalize(images):
    """Return uint8 images as floats from -1 to 1, as the tutorial's transform does."""
    return (images / 127.5).sub_(1)


def augment(images, pixels, batch_size):
    """Return images, float (n, channels, height, width), each mirrored and shifted at random.

    About half of them are mirrored. All are shifted by up to pixels in each direction. batch_size
    is the size of the whole batch: every process draws random numbers for all, and uses its share.
    """
    device = images.device
    shift = torch.randint(2 * pixels + 1, (batch_size, 2), device=device)
    is_mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
    top, left = processes.own_share(shift).T
    # A shift per image: plain slices would shift all images alike.
    images = shifts(images, pixels)[torch.arange(len(images), device=device), :, top, left]
    return torch.where(processes.own_share(is_mirrored), images.flip(3), images)


def views(images):
    """Return a list of 50 views of the images, float (n, channels, height, width).

    A view is shifted by up to 2 pixels in each direction, and mirrored or not.
    """
    windows = shifts(images, 2)
    shifted = [windows[:, :, top, left] for top in range(5) for left in range(5)]
    return shifted + [view.flip(3) for view in shifted]


def shifts(images, pixels):
    """Return all shifts of images, float (n, channels, height, width), by up to pixels.

    The result is (n, channels, top, left, height, width). result[:, :, pixels, pixels] is not
    shifted. Reflection fills the border, as in https://github.com/KellerJordan/cifar10-airbench.
    Raises NotAllowed for images of too few pixels.
    """
    smaller = min(images.shape[2:])
    if pixels >= smaller:
        raise NotAllowed(f"augment is {pixels}; allowed: < {smaller}, the images' size")
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    _, _, height, width = images.shape
    return padded.unfold(2, height, 1).unfold(3, width, 1)


@contextlib.contextmanager
def limited_by_memory(args):
    """Raise NotAllowed, which names batch_size, if the device has too little memory to train.

    torch then raises a RuntimeError. Only its message shows the cause.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "allocate memory", "alloc_failed")
        words = str(error).lower()
        if not isinstance(error, MemoryError) and not any(sign in words for sign in signs):
            raise
        allowed = f"as many images as {args.device} has memory for"
        problem = str(error).partition("\n")[0]
        message = f"batch_size is {args.batch_size}; allowed: {allowed}; {problem}"
        raise NotAllowed(message) from error
