"""Checks load_data()'s images, and prepares them: as floats, augmented, as views for --tta."""

import torch
import torch.nn.functional as F

from trial import processes
from trial.hyperparameters import NotAllowed


def check_data(data_set):
    """Raise NotAllowed if data_set is not what load_data() promises."""
    parts = data_set if isinstance(data_set, (tuple, list)) else [data_set]
    kinds = [(getattr(part, "dtype", None), getattr(part, "ndim", None)) for part in parts]
    is_right = kinds == [(torch.uint8, 4), (torch.int64, 1)] * 2
    lengths = [len(part) for part in parts] if is_right else []
    if not is_right or 0 in lengths or lengths[::2] != lengths[1::2]:
        images, labels = "torch.uint8 (N, channels, height, width)", "torch.int64 (N,)"
        allowed = f"for training and for test, images {images} and as many labels {labels}"
        shown = ", ".join(in_words(part) for part in parts)
        raise NotAllowed(f"load_data() returns {shown}; allowed: {allowed}")


@torch.no_grad()
def check_network(model, images, labels, tta=False):
    """Raise NotAllowed if the model does not return a logit for each class, with or without tta.

    images: uint8 (N, channels, height, width), labels: int64 (N,).
    """
    model.eval()
    inputs = normalize(images[:1])
    logits = model(views(inputs)[0] if tta else inputs)
    least, largest = labels.min().item(), labels.max().item()
    is_right = isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == 1
    if least < 0 or not is_right or logits.shape[1] <= largest:
        result = f"Net returns {in_words(logits)} for an image, with labels {least} to {largest}"
        raise NotAllowed(f"{result}; allowed: logits (1, classes), and labels 0 to classes - 1")


def in_words(value):
    """Return a tensor's or an array's type and shape, or another value's type."""
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    return f"{value.dtype} {tuple(value.shape)}" if is_array else type(value).__name__


def make_batch(images, labels, index, pixels):
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
    windows = shifts(images, pixels, "augment")
    images = windows[torch.arange(len(images), device=device), :, top, left]
    return torch.where(processes.own_share(is_mirrored), images.flip(3), images)


def views(images):
    """Return a list of 50 views of the images, float (n, channels, height, width).

    A view is shifted by up to 2 pixels in each direction, and mirrored or not.
    """
    windows = shifts(images, 2, "--tta")
    shifted = [windows[:, :, top, left] for top in range(5) for left in range(5)]
    return shifted + [view.flip(3) for view in shifted]


def shifts(images, pixels, why):
    """Return all shifts of images, float (n, channels, height, width), by up to pixels.

    The result is (n, channels, top, left, height, width). result[:, :, pixels, pixels] is not
    shifted. Reflection fills the border, as in https://github.com/KellerJordan/cifar10-airbench.
    Raises NotAllowed, which names why, for images of too few pixels.
    """
    smaller = min(images.shape[2:])
    if pixels >= smaller:
        raise NotAllowed(f"{why} shifts by {pixels} pixels; allowed: < {smaller}, the images' size")
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    _, _, height, width = images.shape
    return padded.unfold(2, height, 1).unfold(3, width, 1)
