"""The batch of one training step: chosen images as floats, changed at random if asked to."""

import contextlib

import torch
import torch.nn.functional as F

from trial import processes
from trial.hyperparameters import NotAllowed


def make(images, labels, index, pixels):
    """Return the images with these indices, ready for the network, and their labels.

    images: uint8 (N, channels, height, width), labels: int64 (N,), index: int64 (n,). Returns
    floats (n, channels, height, width) and int64 (n,). If pixels is not 0, each image is mirrored
    at random and shifted by up to pixels. Of several processes each gets its share.
    """
    chosen = processes.own_share(index)
    inputs = normalize(images.index_select(0, chosen))  # as images[chosen], but faster
    if pixels:
        inputs = augment(inputs, pixels, len(index))
    return inputs, labels.index_select(0, chosen)


def normalize(images):
    """Return uint8 images as floats from -1 to 1: less a mean of 0.5, over a deviation of 0.5."""
    return (images / 127.5).sub_(1)


def augment(images, pixels, batch_size):
    """Return images, float (n, channels, height, width), each mirrored and shifted at random.

    Half of them are mirrored; all are shifted by up to pixels in each direction. batch_size counts
    the images of all processes, which draw the same numbers.
    """
    device = images.device
    shift = torch.randint(2 * pixels + 1, (batch_size, 2), device=device)
    is_mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
    top, left = processes.own_share(shift).T
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

    The result is (n, channels, top, left, height, width); [:, :, pixels, pixels] are the images
    themselves. Reflection fills the uncovered border, as in airbench
    (https://github.com/KellerJordan/cifar10-airbench).
    """
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    _, _, height, width = images.shape
    return padded.unfold(2, height, 1).unfold(3, width, 1)


@contextlib.contextmanager
def limited_by_memory(args):
    """Raise NotAllowed, naming batch_size, if the device has too little memory for the training.

    torch raises a RuntimeError then; only its message tells it from other RuntimeErrors.
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
