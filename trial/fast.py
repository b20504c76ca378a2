"""Makes training faster, with the same results. You may delete this file.

It sets CPU threads and memory layouts, and turns the training step into a CUDA graph.
"""

import contextlib
import ctypes
import os

import torch


def prepare(model, device, batch_size):
    """Set up torch and the model for steps of batch_size images. The model is on the device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
    if device.type == "cpu":
        prepare_cpu(model, batch_size)


def prepare_cpu(model, batch_size):
    """Set up torch and model for steps of batch_size images on CPUs."""
    # In small batches, a second thread and oneDNN's kernels cost more time than they save.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), batch_size // 8)))
    torch.backends.mkldnn.enabled = batch_size >= 16
    has_convolutions = any(parameter.ndim == 4 for parameter in model.parameters())
    if batch_size >= 16 and has_convolutions:
        # oneDNN works in this layout. From any other it converts weights and images at each use.
        model.to(memory_format=torch.channels_last)
        model.register_forward_pre_hook(to_channels_last)
    # Keep freed memory for the next step. By default glibc returns large blocks to Linux, which
    # clears their pages when a step needs them again: that takes a quarter of the time.
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


def to_channels_last(model, inputs):
    """Return the model's only input, the images, in oneDNN's layout."""
    (images,) = inputs
    return images.contiguous(memory_format=torch.channels_last)


def as_cuda_graph(function, batch_size, device):
    """Return function(index), which runs as a CUDA graph if the index has batch_size entries.

    function returns a tensor. The graph's next run overwrites it. Python launches the 60 kernels of
    a step more slowly than a GPU runs them; a graph launches them all at once. This follows
    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture.
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
        graph_index.copy_(index)  # a graph always uses the same memory
        if calls <= 3:  # the first runs do set-up work that a graph cannot record
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
