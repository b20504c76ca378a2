"""The device of a trial, and several processes that train together. torchrun starts one per GPU.

    torchrun --standalone --nproc-per-node=gpu train.py

Each process holds the whole model and all data. It computes its share of each batch and adds its
gradients to the others' gradients, so all take the same step. In an ordinary trial, one process
trains alone. Then these functions do nothing, or return their argument.
"""

import contextlib
import os
import re

import torch
from torch import distributed

from trial.hyperparameters import NotAllowed


def default_device():
    """Return the accelerator for this process, or "cpu" if torch finds none."""
    if not torch.accelerator.is_available():
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets it
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def check_device(device):
    """Raise NotAllowed if torch cannot use the device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "one that torch finds; " + str(error).partition("\n")[0]
        raise NotAllowed(f"--device is {device}; allowed: {allowed}") from error


@contextlib.contextmanager
def limited_by_memory(args):
    """Raise NotAllowed, which names batch_size, if the device has too little memory to train."""
    try:
        yield
    except RuntimeError as error:  # only torch's message shows the cause
        if not re.search("out of memory|allocate memory|alloc_failed", str(error), re.IGNORECASE):
            raise
        problem = str(error).partition("\n")[0]
        allowed = f"as many images as {args.device} has memory for; {problem}"
        raise NotAllowed(f"batch_size is {args.batch_size}; allowed: {allowed}") from error


def start():
    """Join the process group, if torchrun has started this process."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group()


def count():
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first():
    """Return whether this is the process that prints, saves and talks to NNI."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def from_first(function):
    """Call function() in the first process only, and return its result in all of them."""
    results = [function() if is_first() else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(results)
    return results[0]


def own_share(tensor):
    """Return this process's share of tensor, along its first dimension."""
    return tensor.tensor_split(count())[distributed.get_rank()] if count() > 1 else tensor


def total(value):
    """Return the sum of value, a tensor (), over the processes, as a number."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value.item()


def sum_gradients(model):
    """Replace each gradient by its sum over the processes."""
    if count() > 1:
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        # One exchange is faster than one per gradient.
        message = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(message)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, summed in zip(gradients, message.split(sizes), strict=True):
            gradient.copy_(summed.view(gradient.shape))


def end():
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
