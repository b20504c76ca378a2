"""What a training step is made of: its batch, a CPU or a GPU set up for it, and a CUDA graph.

The step itself is train_step() in train.py. What is here makes it as fast as the hardware and
changes none of its results: the same network, batches and 32-bit floats as in torch's plain loop.
"""

import contextlib
import ctypes
import os

import torch
import torch.nn.functional as F

import processes
from hyperparameters import NotAllowed


def make_batch(images, labels, index, pixels):
    """Return the images with these indices, ready for the network, and their labels.

    images: uint8 (N, channels, height, width), labels: int64 (N,), index: int64 (n,). They become
    float (n, channels, height, width), shifted by up to pixels and mirrored at random if pixels is
    not 0. Of several processes each gets its share.
    """
    chosen = processes.own_share(index)
    inputs = normalize(images.index_select(0, chosen))  # as images[chosen], but faster
    if pixels:
        inputs = augment(inputs, pixels, len(index))
    return inputs, labels.index_select(0, chosen)


def normalize(images):
    """Return uint8 images as floats, mean 0.5 and standard deviation 0.5 taken out: -1 to 1."""
    return (images / 127.5).sub_(1)


def augment(images, pixels, batch_size):
    """Return images, float (n, channels, height, width), each by itself changed at random.

    It is mirrored, or not, and shifted by up to pixels in each direction. batch_size is that of all
    processes together, all of which draw the same numbers.
    """
    device = images.device
    shift = torch.randint(2 * pixels + 1, (batch_size, 2), device=device)
    is_mirrored = torch.rand(batch_size, 1, 1, 1, device=device) < 0.5
    top, left = processes.own_share(shift).T
    images = shifts(images, pixels)[torch.arange(len(images), device=device), :, top, left]
    return torch.where(processes.own_share(is_mirrored), images.flip(3), images)


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


def default_device():
    """Return the accelerator that torch finds, of several processes each its own, or "cpu"."""
    if not torch.accelerator.is_available():
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's; else a trial sees one GPU
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def check_device(device):
    """Raise NotAllowed if torch cannot use the device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).partition("\n")[0]
        allowed = "one that torch finds"
        raise NotAllowed(f"--device is {device}; allowed: {allowed}; {problem}") from error


def prepare(model, device, batch_size):
    """Set up torch and model, which is on the device, for steps of batch_size images."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which graphs and several processes go by
    if device.type == "cpu":
        prepare_cpu(model, batch_size)


def prepare_cpu(model, batch_size):
    """Set up torch and model for steps of batch_size images on CPUs, as bench/ finds it fastest."""
    # With a few images to a step, a second thread and oneDNN's kernels cost more than they save.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), batch_size // 8)))
    torch.backends.mkldnn.enabled = batch_size >= 16
    has_convolutions = any(parameter.ndim == 4 for parameter in model.parameters())
    if batch_size >= 16 and has_convolutions:
        # The layout that oneDNN works in; else it would convert weights and images at each use.
        model.to(memory_format=torch.channels_last)
        model.register_forward_pre_hook(to_channels_last)
    # Keep freed memory for the next step: by default glibc returns blocks of this size to Linux,
    # which clears them page by page when they are asked for again, a quarter of the time.
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that it takes


def to_channels_last(model, inputs):
    """Return what model is called with, images (n, channels, height, width), in oneDNN's layout."""
    (images,) = inputs
    return images.contiguous(memory_format=torch.channels_last)


def as_cuda_graph(function, batch_size, device):
    """Return function(index) as a CUDA graph, for index of length batch_size; others run as before.

    function returns a tensor; the graph's is overwritten by its next run. Python starts the 60
    kernels of a step more slowly than a GPU runs them; a graph starts all at once.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture is the source.
    """
    graph_index = torch.empty(batch_size, dtype=torch.int64, device=device)
    graph_result = None
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    calls = 0

    def graphed(index):
        nonlocal calls, graph_result
        if len(index) != batch_size:
            return function(index)
        calls += 1
        graph_index.copy_(index)  # a graph reads and writes the same memory each time
        if calls <= 3:  # what is set up at first use cannot be recorded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(graph_index)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if calls == 4:
            with torch.cuda.graph(graph):  # records and does not run
                graph_result = function(graph_index)
        graph.replay()
        return graph_result

    return graphed
