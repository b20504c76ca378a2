"""One training step, as fast as the hardware: batches, augmentation, optimizers, CPU settings.

It promises what the plain loop of torch computes: the same network, optimizer, batches and float32.
What only several processes or only a GPU need stands apart, at the end.
"""

import contextlib
import ctypes
import gc
import itertools
import os

import torch
import torch.nn.functional as F
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.sgd import sgd

OPTIMIZERS = ("SGD", "Adam", "AdamW", "Muon")
LR_SCHEDULES = ("constant", "cosine", "one_cycle")


def make_step(model, optimizer, images, labels, args):
    """Return a function that trains on images[index], and the sum of its losses so far.

    images: uint8 (N, channels, height, width), labels: int64 (N,), index: int64 (n,), of which each
    of several processes takes its share. The sum, a float (), stays on the device: reading each
    step's loss would make a GPU wait for Python every time.
    """
    running_loss = torch.zeros((), device=images.device)
    if images.is_cuda:
        torch.cuda.set_device(images.device)  # which graphs and NCCL go by
    is_channels_last = any(
        parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
    )
    _, world_size = rank_and_world_size()
    network = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    def step(index):
        model.zero_grad()
        chosen = own_share(index)
        inputs = normalize(images.index_select(0, chosen))  # as images[chosen], but faster
        if args.augment:
            inputs = augment(inputs, args.augment, len(index))
        if is_channels_last:  # else oneDNN converts them for each of its uses
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        targets = labels.index_select(0, chosen)
        loss = F.cross_entropy(
            network(inputs), targets, reduction="sum", label_smoothing=args.label_smoothing
        )
        loss = loss * (world_size / len(index))  # whose mean over the processes is the batch's
        loss.backward()
        optimizer.step()
        running_loss.add_(loss.detach())

    if images.is_cuda and world_size == 1:
        step = as_cuda_graph(step, min(args.batch_size, len(images)), images.device)
    return step, running_loss


def normalize(images):
    """Return uint8 images as floats, mean 0.5 and standard deviation 0.5 taken out: -1 to 1."""
    return (images / 127.5).sub_(1)


def augment(images, pixels, batch_size):
    """Return images, float (n, channels, height, width), each by itself changed at random.

    It is mirrored, or not, and shifted by up to pixels in each direction. batch_size is that of all
    processes together, all of which draw the same numbers.
    """
    device = images.device
    top, left = own_share(torch.randint(2 * pixels + 1, (batch_size, 2), device=device)).T
    mirrored = own_share(torch.rand(batch_size, 1, 1, 1, device=device)) < 0.5
    images = shifts(images, pixels)[torch.arange(len(images), device=device), :, top, left]
    return torch.where(mirrored, images.flip(3), images)


def views(images):
    """Return the images, float (n, channels, height, width), in each of 50 views, a list.

    A view is shifted by up to 2 pixels in each direction, and mirrored, or not.
    """
    windows = shifts(images, 2)
    shifted = [windows[:, :, top, left] for top in range(5) for left in range(5)]
    return shifted + [view.flip(3) for view in shifted]


def shifts(images, pixels):
    """Return all shifts of images, float (n, channels, height, width), by up to pixels.

    (n, channels, top, left, height, width): [:, :, pixels, pixels] are the images themselves. What
    a shift uncovers is filled by reflection, as airbench does it
    (https://github.com/KellerJordan/cifar10-airbench).
    """
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    _, _, height, width = images.shape
    return padded.unfold(2, height, 1).unfold(3, width, 1)


class Optimizer:
    """The optimizer that args names, for all of model's parameters.

    SGD, Adam and AdamW are those of torch.optim, by default in all but the hyperparameters in
    args; args.momentum is Adam's and AdamW's beta1. Muon is SGD with Nesterov momentum whose step
    is made orthogonal for each layer's weights: https://kellerjordan.github.io/posts/muon/

    lr is a float tensor () on the device, to be filled before a step: a CUDA graph would not see
    a Python number change.
    """

    def __init__(self, args, model):
        self.name = args.optimizer
        self.momentum = args.momentum
        self.parameters = list(model.parameters())
        device = self.parameters[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # as the kernels have it
        self.lr = torch.tensor(args.lr, dtype=dtype, device=device)
        self.averages = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.settings = {"weight_decay": args.weight_decay, "maximize": False, "fused": True}
        # The functions behind torch.optim's classes, because the classes import torch.compile, a
        # second and 140 MiB, and spend a tenth of a step of 4 images on bookkeeping.
        if args.optimizer in ("Adam", "AdamW"):
            self.function = adam if args.optimizer == "Adam" else adamw
            squares = [torch.zeros_like(parameter) for parameter in self.parameters]
            steps = [torch.zeros((), device=device) for _ in self.parameters]
            self.state = [self.averages, squares, [], steps]
            self.settings |= {"beta1": args.momentum, "beta2": 0.999, "eps": 1e-8, "amsgrad": False}
        else:
            self.function = sgd
            self.state = [self.averages]
            momentum = args.momentum if args.optimizer == "SGD" else 0  # Muon has its own
            self.settings |= {"momentum": momentum, "dampening": 0, "nesterov": False}

    @torch.no_grad()
    def step(self):
        """Update the parameters by their gradients, which Muon overwrites."""
        gradients = [parameter.grad for parameter in self.parameters]
        if self.name == "Muon":
            for gradient, average in zip(gradients, self.averages, strict=True):
                average.mul_(self.momentum).add_(gradient)
                gradient.add_(average, alpha=self.momentum)
                if gradient.ndim > 1:  # not a bias
                    gradient.copy_(orthogonalize(gradient.flatten(1)).view(gradient.shape))
        self.function(self.parameters, gradients, *self.state, lr=self.lr, **self.settings)


def orthogonalize(matrix):
    """Return the matrix (n, m) with its singular values all made about 1, from 0.78 to 1.22.

    Those below 0.05 * sqrt(norm of the Gram matrix), a little more than a twentieth of the largest,
    end lower. It is Muon's iteration, with the coefficients that are best for two rounds by Polar
    Express (https://arxiv.org/abs/2505.16932), and on the Gram matrix, which is smaller.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    gram = matrix @ matrix.T
    size = gram.norm() + 1e-14  # >= the largest singular value's square, as the coefficients need
    gram = gram / size
    first = polynomial(gram, 6.7524, -18.3510, 13.2633)
    second = polynomial(first @ gram @ first, 2.5379, -1.8747, 0.4413)
    return (second @ first).div_(size.sqrt()) @ matrix


def polynomial(matrix, a, b, c):
    """Return a + b * matrix + c * matrix ** 2, of a symmetric matrix (n, n)."""
    result = torch.addmm(matrix, matrix, matrix, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def learning_rates(args, steps):
    """Return the learning rate of each step, an iterable, by torch's scheduler for the schedule.

    cosine falls from args.lr to 0. one_cycle rises to args.lr and falls, as OneCycleLR does by
    default, but leaves the momentum alone: it is a hyperparameter of its own.
    """
    if args.lr_schedule == "constant":
        return itertools.repeat(args.lr, steps)
    optimizer = ScheduledRate(args.lr)
    if args.lr_schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, steps)
    else:
        scheduler = OneCycleLR(optimizer, args.lr, total_steps=steps, cycle_momentum=False)
    rates = scheduler.get_last_lr()
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    return rates


class ScheduledRate(torch.optim.Optimizer):
    """What torch's schedulers need of an optimizer, without what the real ones import."""

    def __init__(self, lr):
        self.param_groups = [{"lr": lr}]

    def step(self):
        pass


def prepare_cpu(model, batch_size):
    """Set up torch and model for steps of batch_size images on CPUs, as bench/ finds it fastest."""
    # With a few images to a step, a second thread and oneDNN's kernels cost more than they save.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), batch_size // 8)))
    torch.backends.mkldnn.enabled = batch_size >= 16
    if batch_size >= 16:
        model.to(memory_format=torch.channels_last)  # the layout that oneDNN works in
    # Keep freed memory for the next step: by default glibc returns blocks of this size to Linux,
    # which clears them page by page when they are asked for again, a quarter of the time.
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that it takes


def is_out_of_memory(error):
    """Return whether an exception says that the device has too little memory, in torch's words."""
    signs = ("out of memory", "allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


# Only with a GPU.


def default_device():
    """Return the accelerator that torch finds, of several processes each its own, or "cpu"."""
    if not torch.accelerator.is_available():
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's; else a trial sees one GPU
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def as_cuda_graph(step, batch_size, device):
    """Return step(index) as a CUDA graph, for index of length batch_size; others run as before.

    Python starts the 60 kernels of a step more slowly than a GPU runs them; a graph starts all at
    once. https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture is the source.
    """
    static_index = torch.empty(batch_size, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    calls = 0

    def graphed_step(index):
        nonlocal calls
        if len(index) != batch_size:
            return step(index)
        calls += 1
        static_index.copy_(index)  # a graph reads and writes the same memory each time
        if calls <= 3:  # what is set up at first use cannot be recorded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(static_index)
            torch.cuda.current_stream().wait_stream(stream)
            return None
        if calls == 4:
            with torch.cuda.graph(graph):  # records and does not run
                step(static_index)
        return graph.replay()

    return graphed_step


# Only with several processes, as torchrun starts them.


def start_processes():
    """Join the other processes of this trial, if torchrun has started it."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()


def rank_and_world_size():
    """Return this process's rank and how many there are of this trial: 0 and 1 without torchrun."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def from_first_process(value):
    """Return the value, any object, that the process of rank 0 gives."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def own_share(tensor):
    """Return this process's share of tensor, which the trial's processes split evenly."""
    rank, world_size = rank_and_world_size()
    return tensor if world_size == 1 else tensor.tensor_split(world_size)[rank]


def sum_over_processes(value):
    """Return the sum of value, a tensor (), over the trial's processes, as a number."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value.item()


def end_processes():
    """Leave the other processes, once the model is done with."""
    if torch.distributed.is_initialized():
        # Without DistributedDataParallel, which refers to itself, destroying the group ends its
        # threads. One that outlives Python's own end now and then aborts the process.
        gc.collect()
        torch.distributed.destroy_process_group()
