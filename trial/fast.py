"""Makes train.py start and train faster, with the same results. You may delete this file.

train.py imports this file first, because it loads torch and NNI itself.
"""

import contextlib
import ctypes
import gc
import os
import sys

# A thread of torch that waits for another one first spins. On a machine with other users, the
# default is so long that the other thread gets too little CPU time (docs/speed.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# NNI's json_tricks loads pandas, which only tables need: 0.2 s and 34 MiB. Python does not find a
# module that is None in sys.modules.
pandas = sys.modules.setdefault("pandas", None)
gc.disable()  # it would run 500 times, for a second, and find nothing

import nni  # noqa: E402, F401
import torch  # noqa: E402

gc.freeze()  # the modules' objects stay until the end: later runs leave them out
gc.enable()
if pandas is None:
    del sys.modules["pandas"]


def prepare(model, device, batch_size):
    """Set up torch and the model for steps of batch_size images. The model is on the device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
    if device.type != "cpu":
        return
    # In small batches, a second thread and oneDNN's kernels cost more time than they save.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), batch_size // 8)))
    torch.backends.mkldnn.enabled = batch_size >= 16
    has_convolutions = any(parameter.ndim == 4 for parameter in model.parameters())
    if batch_size >= 16 and has_convolutions:
        # oneDNN works in this layout. From any other it converts weights and images at each use.
        layout = {"memory_format": torch.channels_last}
        model.to(**layout)
        model.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous(**layout))
    # Keep freed memory for the next step. By default glibc returns large blocks to Linux, which
    # clears their pages when a step needs them again: that takes a quarter of the time.
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


def as_cuda_graph(function, batch_size, device):
    """Return function(index), which runs as a CUDA graph if the index has batch_size entries.

    function returns a tensor, which the next run overwrites. Python launches the 60 kernels of a
    step more slowly than a GPU runs them; a graph launches them all at once. This follows
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
