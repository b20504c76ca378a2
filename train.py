"""Train the CNN of PyTorch's CIFAR-10 classifier tutorial, by itself or as a trial of NNI.

    python train.py                  # the baseline: the tutorial's hyperparameters
    nnictl create -c config.yml      # a search: many trials, hyperparameters from NNI's tuner
    torchrun --standalone --nproc-per-node=gpu train.py      # the baseline on several GPUs

A trial reports the mean training loss of every 2,000 batches as intermediate results and the
accuracy on the test images, in percent, as its final result. Network and training are those of
https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import nni
import torch
import torch.nn.functional as F
from filelock import FileLock
from nni.utils import merge_parameter
from torch import nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.sgd import sgd
from tqdm import tqdm

OPTIMIZERS = ("SGD", "Adam", "AdamW", "Muon")
LR_SCHEDULES = ("constant", "cosine", "one_cycle")
# The keys that a search space may use. Each is a flag, too: batch_size is --batch-size.
HYPERPARAMETERS = {  # key: (default, what it is, what is allowed, the check of that)
    "batch_size": (4, "images per step", "an integer >= 1", lambda v: v >= 1),
    "lr": (0.001, "learning rate", "a finite number > 0", lambda v: 0 < v < math.inf),
    "epochs": (2, "passes over the training set", "an integer >= 1", lambda v: v >= 1),
    "optimizer": ("SGD", "algorithm", ", ".join(OPTIMIZERS), lambda v: v in OPTIMIZERS),
    "momentum": (0.9, "or Adam's beta1", "a number in [0, 1)", lambda v: 0 <= v < 1),
    "weight_decay": (0.0, "pull to 0", "a finite number >= 0", lambda v: 0 <= v < math.inf),
    "label_smoothing": (0.0, "of the loss", "a number in [0, 1)", lambda v: 0 <= v < 1),
    "lr_schedule": ("constant", "of lr", ", ".join(LR_SCHEDULES), lambda v: v in LR_SCHEDULES),
    "augment": (0, "mirror, and shift by pixels", "an integer in [0, 16]", lambda v: 0 <= v <= 16),
}


class Net(nn.Module):
    """The tutorial's network: float images (N, 3, 32, 32) in, logits (N, 10) out."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def orthogonalize(matrix):
    """Return the matrix (n, m) with its singular values all made about 1, from 0.7 to 1.2.

    The Newton-Schulz iteration and its coefficients are those of Muon,
    https://kellerjordan.github.io/posts/muon/
    """
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.775 * square) @ matrix
    return matrix


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
            self.settings |= {"beta1": args.momentum, "beta2": 0.999}
            self.settings |= {"eps": 1e-8, "amsgrad": False}
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
                    matrix = orthogonalize(gradient.flatten(1))
                    gradient.copy_(matrix.view(gradient.shape))
        self.function(self.parameters, gradients, *self.state, lr=self.lr, **self.settings)


def learning_rates(args, steps):
    """Return the learning rate of each step, an iterable, by torch's scheduler for the schedule.

    cosine falls from args.lr to 0. one_cycle rises to args.lr and falls, as OneCycleLR does by
    default, but leaves the momentum alone: it is a hyperparameter of its own.
    """
    if args.lr_schedule == "constant":
        return itertools.repeat(args.lr, steps)
    # The schedulers work on one of torch.optim's classes, which is not the one that trains.
    optimizer = torch.optim.SGD([torch.zeros(1)], args.lr)
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


def processes():
    """Return this process's rank and how many there are of this trial: 0 and 1 without torchrun."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def part(tensor):
    """Return this process's part of tensor, which the trial's processes share evenly."""
    rank, count = processes()
    return tensor if count == 1 else tensor.tensor_split(count)[rank]


def total(value):
    """Return the sum of value, a tensor (), over the trial's processes, as a number."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value.item()


def normalize(images):
    """Return uint8 images as floats, mean 0.5 and standard deviation 0.5 taken out: -1 to 1."""
    return (images / 127.5).sub_(1)


def augment(images, pixels, batch_size):
    """Return images, float (n, 3, 32, 32), each by itself shifted and mirrored, or not, at random.

    A shift is of up to pixels in each direction; what it uncovers is filled by reflection, as
    airbench (https://github.com/KellerJordan/cifar10-airbench) does it. batch_size is that of
    all processes together, all of which draw the same numbers.
    """
    device = images.device
    top, left = part(torch.randint(2 * pixels + 1, (batch_size, 2), device=device)).T
    mirrored = part(torch.rand(batch_size, 1, 1, 1, device=device)) < 0.5
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (image, channel, top, left, 32, 32)
    images = windows[torch.arange(len(images), device=device), :, top, left]
    return torch.where(mirrored, images.flip(3), images)


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


def replay(step, batch_size, device):
    """Return step(index) as a CUDA graph, for index of length batch_size; others run as before.

    Python starts the 60 kernels of a step more slowly than a GPU runs them; a graph starts all at
    once. https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture is the source.
    """
    static_index = torch.empty(batch_size, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    calls = 0

    def replay_step(index):
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

    return replay_step


def make_step(model, optimizer, images, labels, args):
    """Return a function that trains on images[index], and the sum of its losses so far.

    index is int64 (n,), of which each process takes its part. The sum, a float (), stays on the
    device: reading each step's loss would make a GPU wait for Python every time.
    """
    running_loss = torch.zeros((), device=images.device)
    if images.is_cuda:
        torch.cuda.set_device(images.device)  # which graphs and NCCL go by
    _, count = processes()
    network = nn.parallel.DistributedDataParallel(model) if count > 1 else model

    def step(index):
        model.zero_grad()
        mine = part(index)
        inputs = normalize(images.index_select(0, mine))  # the same as images[mine], but faster
        if args.augment:
            inputs = augment(inputs, args.augment, len(index))
        targets = labels.index_select(0, mine)
        loss = F.cross_entropy(
            network(inputs), targets, reduction="sum", label_smoothing=args.label_smoothing
        )
        loss = loss * (count / len(index))  # so that its average over the processes is the batch's
        loss.backward()
        optimizer.step()
        running_loss.add_(loss.detach())

    if images.is_cuda and count == 1:
        step = replay(step, min(args.batch_size, len(images)), images.device)
    return step, running_loss


def train(model, optimizer, images, labels, args):
    """Train for args.epochs, printing and reporting to NNI the mean loss of each window of batches.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), on the model's device. A window is
    args.report_every batches, or the whole epoch where that is shorter. The batches after the
    last whole window go unreported, as in the tutorial. Raises FloatingPointError at the end of
    the window in which the loss stopped being finite.
    """
    model.train()
    step, running_loss = make_step(model, optimizer, images, labels, args)
    rates = iter(learning_rates(args, args.epochs * math.ceil(len(images) / args.batch_size)))
    rank, count = processes()
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)
        window = min(args.report_every, len(batches))
        # disable=None shows the progress bar on a terminal only, so never in a trial.
        progress = tqdm(batches, f"epoch {epoch}", leave=False, disable=rank > 0 or None)
        for number, index in enumerate(progress, start=1):
            optimizer.lr.fill_(next(rates))
            step(index)
            if number % window == 0 or number == len(batches):
                mean_loss = total(running_loss) / count / window
                running_loss.zero_()
                if not math.isfinite(mean_loss):
                    place = f"epoch {epoch}, batch {number}"
                    raise FloatingPointError(f"the loss is {mean_loss} at {place}")
                if number % window == 0 and rank == 0:
                    tqdm.write(f"[{epoch}, {number:5d}] loss: {mean_loss:.3f}")
                    nni.report_intermediate_result(mean_loss)


@torch.inference_mode()
def test(model, images, labels, tta=False):
    """Return how many of the images (uint8, (N, 3, 32, 32)) get their label (int64, (N,)).

    With tta, test-time augmentation, an image's logits are those of it and its mirror image added.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for x, y in zip(part(images).split(250), part(labels).split(250), strict=True):
        inputs = normalize(x)
        logits = model(inputs) + model(inputs.flip(3)) if tta else model(inputs)
        correct += (logits.argmax(1) == y).sum()
    return total(correct)


def save(content, path, tensors):
    """Write content with torch.save, whole or not at all: readers see the old file or the new.

    tensors are those in content, which its size is that of. Raises OSError, naming the file and
    what it needs, if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk
        unfinished.unlink(missing_ok=True)  # it takes of what is free
        needed = sum(tensor.nbytes for tensor in tensors) / 1e6
        free = shutil.disk_usage(path.absolute().parent).free / 1e6
        room = f"it takes {needed:.1f} MB, and {free:.1f} MB are free"
        raise OSError(f"cannot write {path}: {room}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def checksums(tensors):
    """Return each tensor's sum as 64-bit integers: a check of all of CIFAR-10 in 20 ms."""
    return [tensor.view(torch.int64).sum().item() for tensor in tensors]


def read_cache(cache):
    """Return the tensors in the cache file, mapped into memory, or None if missing or damaged."""
    if not cache.exists():
        return None
    try:
        content = torch.load(cache, mmap=True, weights_only=True)
        if checksums(content["tensors"]) == content["checksums"]:
            return content["tensors"]
    except Exception:  # what torch.load raises depends on what is damaged
        pass
    print(f"{cache} is damaged and not used", file=sys.stderr)
    return None


def decode_cifar10(data_dir):
    """Return what load_cifar10 does, from torchvision, which verifies or downloads the data set."""
    # Not at the top: it takes a second, which a trial that finds the cache need not wait.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    # Seconds. torchvision's download sets no limit and would wait for ever for a silent server.
    socket.setdefaulttimeout(30)
    try:
        splits = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # of the network, the disk or the data: the message says which
        folder = data_dir.absolute() / CIFAR10.base_folder
        files = [*CIFAR10.train_list, *CIFAR10.test_list]
        files.append((CIFAR10.meta["filename"], CIFAR10.meta["md5"]))
        missing = [name for name, md5 in files if not check_integrity(folder / name, md5)]
        free = shutil.disk_usage(data_dir).free / 1e6
        raise FileNotFoundError(
            f"CIFAR-10 cannot be loaded. Missing or damaged in {folder}: {', '.join(missing)}\n"
            f"What failed: {type(error).__name__}: {error}\n"
            f"It takes 550 MB there, archive and cache included; {free:.0f} MB are free.\n"
            "Three ways on:\n"
            f"  - put {CIFAR10.filename} from {CIFAR10.url} into {data_dir.absolute()}\n"
            f"  - point --data-dir or CIFAR10_DIR at a folder that holds {CIFAR10.base_folder}\n"
            "  - try --dataset synthetic, which needs no download"
        ) from error
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return [images[0], labels[0], images[1], labels[1]]


def load_cifar10(data_dir):
    """Return CIFAR-10 as [training images, their labels, test images, their labels].

    The images are uint8 (N, 3, 32, 32), the labels int64 (N,), 50,000 and 10,000 of them. They come
    from a cache file beside the data set, which the first trial makes and all later ones map into
    memory, so that concurrent trials share one copy. Raises FileNotFoundError, with the ways on,
    if the data set is neither there nor to be downloaded.
    """
    cache = data_dir / "cifar10.pt"
    if tensors := read_cache(cache):
        return tensors
    data_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(data_dir, os.W_OK):
        print(f"{data_dir} is read-only, so this run decodes CIFAR-10 for itself", file=sys.stderr)
        return decode_cifar10(data_dir)
    with FileLock(f"{cache}.lock"):
        if tensors := read_cache(cache):  # made by another trial while this one waited for the lock
            return tensors
        for unfinished in data_dir.glob(f"{cache.name}.*.tmp"):  # a trial was killed at save()
            unfinished.unlink()
        tensors = decode_cifar10(data_dir)
        save({"tensors": tensors, "checksums": checksums(tensors)}, cache, tensors)
    return read_cache(cache) or tensors


def make_synthetic():
    """Return a stand-in for CIFAR-10 in the same form, 10,000 images to train on and 2,000 to test.

    A class is a smooth random texture; an image is a window of it at a random place, under a
    fainter window of another class and under noise. The seed is fixed: everyone gets the same.
    """
    generator = torch.Generator().manual_seed(0)
    textures = torch.randn(10, 3, 8, 8, generator=generator)
    textures = F.interpolate(textures, size=(48, 48), mode="bicubic")
    windows = textures.unfold(2, 32, 1).unfold(3, 32, 1)  # (class, channel, top, left, 32, 32)
    labels = torch.arange(12_000) % 10
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    top, left, other_top, other_left = torch.randint(17, (4, len(labels)), generator=generator)
    images = windows[labels, :, top, left] + 0.7 * windows[others, :, other_top, other_left]
    images += 2.5 * torch.randn(images.shape, generator=generator)
    images = images.mul_(32).add_(128).clamp_(0, 255).byte()
    return [images[:10_000], labels[:10_000], images[10_000:], labels[10_000:]]


def hold_out(images, labels):
    """Return training images, their labels, validation images, their labels, from training data.

    The last tenth of each class is held out to validate on: of CIFAR-10 500 images of each class.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero()
        held[places[len(places) * 9 // 10 :]] = True
    return [images[~held], labels[~held], images[held], labels[held]]


def merge(args, values, source):
    """Merge values, a dict of hyperparameters, over args in place.

    Raises ValueError, with one line that names source, key, value and what is allowed, for a key
    that does not exist, a wrong type and a value out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source} is {values!r}; allowed: an object of hyperparameters")
    for key, value in values.items():
        if key not in HYPERPARAMETERS:
            known = ", ".join(HYPERPARAMETERS)
            raise ValueError(f"{source}: {key} is {value!r}; allowed keys: {known}")
        _, _, allowed, accepts = HYPERPARAMETERS[key]
        try:
            merge_parameter(args, {key: value})
            accepted = not isinstance(value, bool) and accepts(getattr(args, key))
        except (ValueError, OverflowError):
            accepted = False
        if not accepted:
            raise ValueError(f"{source}: {key} is {value!r}; allowed: {allowed}")


def parse_args(argv):
    """Return the settings, with the hyperparameters of --params under those of the flags.

    Exits with status 2, and one line on stderr, for a flag or a value that is not allowed.
    """
    parser = argparse.ArgumentParser(
        description="Train the CNN of PyTorch's CIFAR-10 tutorial, by itself or as a trial of NNI.",
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for key, (default, meaning, allowed, _) in HYPERPARAMETERS.items():
        flag = "--" + key.replace("_", "-")
        text = f"{meaning}: {allowed} (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text)
    data = os.environ.get("CIFAR10_DIR") or Path(__file__).resolve().parent / "data"
    device = "cpu"
    if torch.accelerator.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's; else a trial sees one GPU
        device = torch.device(torch.accelerator.current_accelerator().type, local_rank)
    add = parser.add_argument
    add("--params", type=Path, metavar="FILE", help="JSON of hyperparameters; flags override it")
    add(
        "--dataset",
        choices=("cifar10", "synthetic"),
        default="cifar10",
        help="synthetic needs no download",
    )
    add("--data-dir", type=Path, default=data, help="where CIFAR-10 is or is downloaded to")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    add("--device", default=device, help="where to train, as torch names it")
    add("--report-every", type=int, default=2000, help="batches in a reported mean loss")
    add("--validate", action="store_true", help="hold out training images and test on those")
    add("--tta", action="store_true", help="test each image together with its mirror image")
    add("--save", type=Path, metavar="FILE", help="write the trained weights there, a state dict")
    args, unknown = parser.parse_known_args(argv)

    flags = {key: vars(args).pop(key) for key in HYPERPARAMETERS if key in args}
    for key, (default, *_) in HYPERPARAMETERS.items():
        setattr(args, key, default)
        with contextlib.suppress(KeyError, ValueError):  # not given, or text that merge() refuses
            flags[key] = type(default)(flags[key])
    try:
        if unknown:
            words = " ".join(unknown).split()  # one line, whatever they hold
            raise ValueError(f"unknown: {' '.join(words)}; allowed: the flags in --help")
        if args.params:
            values = json.loads(args.params.read_text(encoding="utf-8"))
            if isinstance(values, dict):  # choose.py puts them into an object with their origin
                values = values.get("hyperparameters", values)
            merge(args, values, args.params)
        merge(args, flags, "command line")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; allowed: an integer from 0 to 2**63 - 1")
        if args.report_every < 1:
            raise ValueError(f"--report-every is {args.report_every}; allowed: an integer >= 1")
        if args.save and (args.save.is_dir() or not args.save.absolute().parent.is_dir()):
            raise ValueError(f"--save is {args.save}; allowed: a file in a folder that exists")
        torch.zeros(1, device=args.device).item()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        parser.error(f"--params is {args.params}; allowed: a JSON file; {error}")
    except (OSError, ValueError) as error:
        parser.error(error)
    except (RuntimeError, AssertionError) as error:  # torch's, some of several lines
        problem = str(error).splitlines()[0]
        parser.error(f"--device is {args.device}; allowed: one that torch finds; {problem}")
    return args


def train_and_test(args, data):
    """Train on data, as load_cifar10 returns it, and return the model and how much it gets right.

    Raises MemoryError or RuntimeError if the device has too little memory.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    data = [tensor.to(args.device) for tensor in data]
    train_images, train_labels, test_images, test_labels = data
    model = Net().to(args.device)
    rank, count = processes()
    if train_images.is_cpu:
        prepare_cpu(model, args.batch_size // count)
    try:
        train(model, Optimizer(args, model), train_images, train_labels, args)
    except FloatingPointError as error:
        # The trial goes on to its final result, so that the tuner learns how bad these values are.
        if rank == 0:
            print(f"Warning: training ends early: {error}", file=sys.stderr)
    return model, test(model, test_images, test_labels, args.tta)


def main(argv=None):
    """Run one trial with argv, by default the command line, and return its accuracy in percent."""
    nni.silence_stdout()  # by itself the script would print each result twice, once in NNI's words
    args = parse_args(argv)
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()
    rank, count = processes()
    try:
        # Only one process talks to NNI. It tells the others what the tuner has chosen.
        tuned = [nni.get_next_parameter() if rank == 0 else None]
        if count > 1:
            torch.distributed.broadcast_object_list(tuned)
        merge(args, tuned[0], "tuner")
        if args.batch_size % count:
            allowed = f"a multiple of {count}, the processes of the trial"
            raise ValueError(f"batch_size is {args.batch_size}; allowed: {allowed}")
        torch.manual_seed(args.seed)
        data = make_synthetic() if args.dataset == "synthetic" else load_cifar10(args.data_dir)
        if args.validate:
            data = hold_out(*data[:2])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    if rank == 0:
        print("Hyperparameters:", json.dumps({key: getattr(args, key) for key in HYPERPARAMETERS}))
        print(f"Training on {args.device}" + (f", one of {count} processes" if count > 1 else ""))

    try:
        model, correct = train_and_test(args, data)
    except (MemoryError, RuntimeError) as error:  # RuntimeError: also torch's, for CPUs and GPUs
        text = str(error).lower()
        if not any(sign in text for sign in ("out of memory", "allocate memory", "alloc_failed")):
            raise
        problem = str(error).splitlines()[0]
        allowed = f"as many images as {args.device} has memory for; {problem}"
        sys.exit(f"train.py: error: batch_size is {args.batch_size}; allowed: {allowed}")
    accuracy = 100 * correct / len(data[3])
    if rank == 0:
        name = "Validation acc" if args.validate else "Acc"
        print(f"{name}: {accuracy:.3f}% ({correct}/{len(data[3])})")
        nni.report_final_result(accuracy)
        if args.save:
            try:
                state = model.cpu().state_dict()
                save(state, args.save, state.values())
            except OSError as error:
                sys.exit(f"train.py: error: {error}")
    if torch.distributed.is_initialized():
        # Without DistributedDataParallel, which refers to itself, destroying the group ends its
        # threads. One that outlives Python's own end now and then aborts the process.
        gc.collect()
        torch.distributed.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    # Python's own answer to SIGTERM, by which NNI kills a trial, would leave half a file behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()
