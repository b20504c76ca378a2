"""Train the CNN of PyTorch's CIFAR-10 classifier tutorial, by itself or as a trial of NNI.

    python train.py                  # the baseline: the tutorial's hyperparameters
    python search.py                 # a search: many trials, hyperparameters from NNI's tuner
    torchrun --standalone --nproc-per-node=gpu train.py      # the baseline on several GPUs

A trial reports the mean training loss of every 2,000 batches as intermediate results and the
accuracy on the test images, in percent, as its final result. Network and training are those of
https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html; the images come from
cifar10.py, and what a step does, as fast as it can be done, is in step.py.
"""

import gc

gc.disable()  # While modules load it finds nothing to free, and would look for it a dozen times.

import argparse
import contextlib
import json
import math
import signal
import sys
from pathlib import Path

import nni
import torch
import torch.nn.functional as F
from nni.utils import merge_parameter
from torch import nn
from tqdm import tqdm

import cifar10
import step
from step import LR_SCHEDULES, OPTIMIZERS

gc.freeze()  # They stay to the end: the collector need not look at them again.
gc.enable()

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


def load_data(args):
    """Return training images, their labels, test images, their labels.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,). Raises OSError if the data cannot be had.
    """
    is_synthetic = args.dataset == "synthetic"
    data = cifar10.make_synthetic() if is_synthetic else cifar10.load_cifar10(args.data_dir)
    return cifar10.hold_out(*data[:2]) if args.validate else data


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
        # The tutorial has relu before pool: the same numbers, but four times as many to look at.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train(model, optimizer, images, labels, args):
    """Train for args.epochs, printing and reporting to NNI the mean loss of each window of batches.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), on the model's device. A window is
    args.report_every batches, or the whole epoch where that is shorter. The batches after the
    last whole window go unreported, as in the tutorial. Raises FloatingPointError at the end of
    the window in which the loss stopped being finite.
    """
    model.train()
    train_step, running_loss = step.make_step(model, optimizer, images, labels, args)
    rates = iter(step.learning_rates(args, args.epochs * math.ceil(len(images) / args.batch_size)))
    rank, world_size = step.rank_and_world_size()
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)
        window = min(args.report_every, len(batches))
        # disable=None shows the progress bar on a terminal only, so never in a trial.
        progress = tqdm(batches, f"epoch {epoch}", leave=False, disable=rank > 0 or None)
        for number, index in enumerate(progress, start=1):
            optimizer.lr.fill_(next(rates))
            train_step(index)
            if number % window == 0 or number == len(batches):
                mean_loss = step.sum_over_processes(running_loss) / world_size / window
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

    With tta, test-time augmentation, an image's logits are those of all its step.views() added.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    images, labels = step.own_share(images), step.own_share(labels)
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        inputs = step.normalize(x)
        logits = sum(model(view) for view in step.views(inputs)) if tta else model(inputs)
        correct += (logits.argmax(1) == y).sum()
    return step.sum_over_processes(correct)


def train_and_test(args, data):
    """Train and test on what load_data() returns; return the model and how much it gets right.

    Raises MemoryError or RuntimeError if the device has too little memory.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    train_images, train_labels, test_images, test_labels = (x.to(args.device) for x in data)
    model = Net().to(args.device)
    rank, world_size = step.rank_and_world_size()
    if train_images.is_cpu:
        step.prepare_cpu(model, args.batch_size // world_size)
    try:
        train(model, step.Optimizer(args, model), train_images, train_labels, args)
    except FloatingPointError as error:
        # The trial goes on to its final result, so that the tuner learns how bad these values are.
        if rank == 0:
            print(f"Warning: training ends early: {error}", file=sys.stderr)
    return model, test(model, test_images, test_labels, args.tta)


def set_hyperparameters(args, values, source):
    """Set in args the values, a dict of hyperparameters.

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


def read_params(path):
    """Return the hyperparameters in a JSON file: an object of them, or as choose.py writes it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--params is {path}; allowed: a JSON file; {error}") from error
    return values.get("hyperparameters", values) if isinstance(values, dict) else values


def parse_args(argv):
    """Return the settings, with the hyperparameters of --params under those of the flags.

    Exits with status 2, and one line on stderr, for a flag or a value that is not allowed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    for key, (default, meaning, allowed, _) in HYPERPARAMETERS.items():
        text = f"{meaning}: {allowed} (default: {default})"
        add("--" + key.replace("_", "-"), default=argparse.SUPPRESS, help=text)
    add("--params", type=Path, metavar="FILE", help="JSON of hyperparameters; flags override it")
    add("--dataset", default="cifar10", choices=cifar10.DATASETS, help="synthetic: no download")
    add("--data-dir", default=cifar10.default_data_dir(), type=Path, help="has or gets CIFAR-10")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    add("--device", default=step.default_device(), help="where to train, as torch names it")
    add("--report-every", type=int, default=2000, help="batches in a reported mean loss")
    add("--validate", action="store_true", help="hold out training images and test on those")
    add("--tta", action="store_true", help="test each image mirrored and shifted, too")
    add("--save", type=Path, metavar="FILE", help="write the trained weights there, a state dict")
    args, unknown = parser.parse_known_args(argv)
    flags = {key: vars(args).pop(key) for key in HYPERPARAMETERS if key in args}
    for key, (default, *_) in HYPERPARAMETERS.items():
        setattr(args, key, default)
        with contextlib.suppress(KeyError, ValueError):  # not given, or text that will be refused
            flags[key] = type(default)(flags[key])
    try:
        if unknown:
            words = " ".join(" ".join(unknown).split())  # one line, whatever they hold
            raise ValueError(f"unknown: {words}; allowed: the flags in --help")
        if args.params:
            set_hyperparameters(args, read_params(args.params), args.params)
        set_hyperparameters(args, flags, "command line")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; allowed: an integer from 0 to 2**63 - 1")
        if args.report_every < 1:
            raise ValueError(f"--report-every is {args.report_every}; allowed: an integer >= 1")
        if args.save and (args.save.is_dir() or not args.save.absolute().parent.is_dir()):
            raise ValueError(f"--save is {args.save}; allowed: a file in a folder that exists")
        torch.zeros(1, device=args.device).item()
    except (OSError, ValueError) as error:
        parser.error(error)
    except (RuntimeError, AssertionError) as error:  # torch's, some of several lines
        problem = str(error).splitlines()[0]
        parser.error(f"--device is {args.device}; allowed: one that torch finds; {problem}")
    return args


def main(argv=None):
    """Run one trial with argv, by default the command line, and return its accuracy in percent."""
    nni.silence_stdout()  # by itself the script would print each result twice, once in NNI's words
    args = parse_args(argv)
    step.start_processes()
    rank, world_size = step.rank_and_world_size()
    try:
        # Only one process talks to NNI. It tells the others what the tuner has chosen.
        tuned = step.from_first_process(nni.get_next_parameter() if rank == 0 else None)
        set_hyperparameters(args, tuned, "tuner")
        if args.batch_size % world_size:
            allowed = f"a multiple of {world_size}, the processes of the trial"
            raise ValueError(f"batch_size is {args.batch_size}; allowed: {allowed}")
    except ValueError as error:
        sys.exit(f"train.py: error: {error}")
    torch.manual_seed(args.seed)
    try:
        data = load_data(args)
        if rank == 0:
            print("Hyperparameters:", json.dumps({key: vars(args)[key] for key in HYPERPARAMETERS}))
            others = f", one of {world_size} processes" * (world_size > 1)
            print(f"Training on {args.device}{others}")
        model, correct = train_and_test(args, data)
        accuracy = 100 * correct / len(data[3])
        if rank == 0:
            name = "Validation acc" if args.validate else "Acc"
            print(f"{name}: {accuracy:.3f}% ({correct}/{len(data[3])})")
            nni.report_final_result(accuracy)
            if args.save:
                state = model.cpu().state_dict()
                cifar10.save(state, args.save, state.values())
    except OSError as error:  # of the data, or of a file that cannot be written
        sys.exit(f"train.py: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not step.is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
        allowed = f"as many images as {args.device} has memory for; {problem}"
        sys.exit(f"train.py: error: batch_size is {args.batch_size}; allowed: {allowed}")
    step.end_processes()
    return accuracy


if __name__ == "__main__":
    # Python's own answer to SIGTERM, by which NNI kills a trial, would leave half a file behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    main()
