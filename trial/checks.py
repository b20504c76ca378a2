"""Checks of load_data() and Net: a mistake in them ends the trial with one line."""

import torch

from trial import batch
from trial.hyperparameters import NotAllowed


def check_data(data_set):
    """Raise NotAllowed if data_set is not what load_data() promises."""
    names = ("training images", "training labels", "test images", "test labels")
    images = (torch.uint8, 4, "torch.uint8 (N, channels, height, width)")
    labels = (torch.int64, 1, "torch.int64 (N,)")
    if not isinstance(data_set, (tuple, list)) or len(data_set) != len(names):
        count = f" of {len(data_set)}" if isinstance(data_set, (tuple, list)) else ""
        found = f"a {type(data_set).__name__}{count}"
        raise NotAllowed(f"load_data() returns {found}; allowed: a tuple of {', '.join(names)}")
    for name, value, kind in zip(names, data_set, [images, labels] * 2, strict=True):
        dtype, dimensions, allowed = kind
        if not isinstance(value, torch.Tensor):
            raise NotAllowed(f"{name} are a {type(value).__name__}; allowed: a tensor, {allowed}")
        if value.dtype != dtype or value.ndim != dimensions:
            raise NotAllowed(f"{name} are {value.dtype} {tuple(value.shape)}; allowed: {allowed}")
    for place in (0, 2):
        images, labels = data_set[place : place + 2]
        if not 0 < len(images) == len(labels):
            found = f"{len(images)} and {names[place + 1]} {len(labels)}"
            raise NotAllowed(f"{names[place]} are {found}; allowed: one label per image")


@torch.no_grad()
def check_network(model, *data_set):
    """Raise NotAllowed if the model does not return a logit for each class in the data set."""
    model.eval()
    for images, labels in (data_set[:2], data_set[2:]):
        logits = model(batch.normalize(images[:1]))
        if not isinstance(logits, torch.Tensor):
            raise NotAllowed(f"Net returns a {type(logits).__name__}; allowed: a tensor of logits")
        shape, least, largest = tuple(logits.shape), labels.min().item(), labels.max().item()
        if least < 0:
            raise NotAllowed(f"a label is {least}; allowed: 0 to the number of classes - 1")
        if len(shape) != 2 or shape[0] != 1 or shape[1] <= largest:
            allowed = f"(1, classes), with more than {largest} classes, as {largest} is a label"
            raise NotAllowed(f"Net returns logits {shape} for one image; allowed: {allowed}")
