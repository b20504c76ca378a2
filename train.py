"""Train the CNN of PyTorch's CIFAR-10 classifier tutorial, by itself or as a trial of NNI.

    python train.py                  # the baseline: the tutorial's hyperparameters
    python search.py                 # a search: many trials, hyperparameters from NNI's tuner
    torchrun --standalone --nproc-per-node=gpu train.py      # the baseline on several GPUs

A trial's intermediate results are the mean training loss of every 2,000 batches. The final result
is the accuracy on the test images in percent. Network and training follow
https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html. Read main() first, at the
end: it is the whole trial in order. For your own network and data, replace Net and load_data().
For a new hyperparameter, add an entry to HYPERPARAMETERS and use args.NAME where it takes effect.
"""

import argparse
import functools
import json
import math
import signal
import sys

try:  # before torch and NNI, which it makes load faster
    from trial import fast
except ImportError:  # trial/fast.py may be deleted: all is slower, with the same results
    fast = None

import nni
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from trial import data, hyperparameters, optimizers, processes
from trial.hyperparameters import Choice, Integer, NotAllowed, Number
from trial.images import check_data, check_network, make_batch, normalize, views

# The keys that a search space may use. Each is also a flag: batch_size is --batch-size.
HYPERPARAMETERS = {
    "batch_size": Integer(4, "images per training step", at_least=1),
    "lr": Number(0.001, "the learning rate, how far a step moves the weights", above=0),
    "epochs": Integer(2, "passes over the training images", at_least=1),
    "optimizer": Choice("SGD", "how gradients change the weights", optimizers.OPTIMIZERS),
    "momentum": Number(0.9, "the weight of past gradients, Adam's beta1", at_least=0, below=1),
    "weight_decay": Number(0.0, "how strongly a step pulls the weights to 0", at_least=0),
    "label_smoothing": Number(0.0, "part of a label spread over all classes", at_least=0, below=1),
    "lr_schedule": Choice("constant", "how lr changes in the training", optimizers.LR_SCHEDULES),
    "augment": Integer(0, "mirror images and shift them by up to N pixels", at_least=0, at_most=16),
}


def load_data(args):
    """Return training images, their labels, test images, their labels.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,). Raises OSError if the data cannot be loaded.
    """
    if args.dataset == "synthetic":
        return data.make_synthetic()
    return data.load_cifar10(args.data_dir)


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
        # The tutorial calls relu before pool. The result is the same, but relu is slower there.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train_step(model, optimizer, images, labels, args, index):
    """Learn from the batch of images with these indices; return its mean loss, a tensor ().

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), index: int64 (n,), on the model's device. Do
    not print or call .item() here: a GPU records this step once and replays it as a CUDA graph. If
    several processes train together, each returns the part of the loss from its own images.
    """
    inputs, targets = make_batch(images, labels, index, args.augment)
    optimizer.zero_grad()
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=args.label_smoothing)
    loss = loss / len(index)  # divide by the whole batch: this process may have only a part
    loss.backward()
    processes.sum_gradients(model)  # a single process: does nothing
    optimizer.step()
    return loss.detach()


def train(model, optimizer, images, labels, args):
    """Train for args.epochs; print and report to NNI the mean loss of each window of batches.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), on the model's device. A window is
    args.report_every batches, or an epoch if that is shorter. As in the tutorial, the batches after
    an epoch's last window are not reported. Raises FloatingPointError if a mean is not finite.
    """
    model.train()
    # learn(index) is train_step() with all other arguments filled in.
    learn = functools.partial(train_step, model, optimizer, images, labels, args)
    batch_size = min(args.batch_size, len(images))
    # A GPU runs the step as a CUDA graph, which cannot record an exchange between processes.
    if fast and images.is_cuda and processes.count() == 1:
        learn = fast.as_cuda_graph(learn, batch_size, images.device)
    steps = args.epochs * math.ceil(len(images) / batch_size)
    schedule = optimizers.LR_SCHEDULES[args.lr_schedule]
    rates = (schedule(args.lr, done, steps) for done in range(steps))
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(images)).to(images.device).split(batch_size)
        window = min(args.report_every, len(batches))
        disable = None if processes.is_first() else True  # None: no bar without a terminal
        running_loss = torch.zeros((), device=images.device)
        progress = tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=disable)
        for number, index in enumerate(progress, start=1):
            optimizer.lr.fill_(next(rates))  # in place: a CUDA graph always reads the same memory
            running_loss += learn(index)
            if number % window == 0:
                mean_loss = processes.total(running_loss) / window
                running_loss.zero_()
                if not math.isfinite(mean_loss):
                    place = f"epoch {epoch}, batch {number}"
                    raise FloatingPointError(f"the loss is {mean_loss} at {place}")
                if processes.is_first():
                    tqdm.write(f"[{epoch}, {number:5d}] loss: {mean_loss:.3f}")
                    nni.report_intermediate_result(mean_loss)


@torch.inference_mode()
def test(model, images, labels, tta=False):
    """Return how many of the images (uint8, (N, 3, 32, 32)) get the right label (int64, (N,)).

    tta: test-time augmentation, which adds the logits of all views() of an image.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    images, labels = processes.own_share(images), processes.own_share(labels)
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        inputs = normalize(x)
        logits = sum(model(view) for view in views(inputs)) if tta else model(inputs)
        correct += (logits.argmax(1) == y).sum()
    return processes.total(correct)


def train_and_test(args, data_set):
    """Train and test a Net with load_data()'s data; return it and the number of right answers."""
    images, labels, test_images, test_labels = (x.to(args.device) for x in data_set)
    torch.backends.cudnn.allow_tf32 = False  # otherwise GPUs round float32 in convolutions
    model = Net().to(args.device)
    if fast:
        fast.prepare(model, images.device, args.batch_size // processes.count())
    check_network(model, images, labels)
    check_network(model, test_images, test_labels, args.tta)
    make_optimizer = optimizers.OPTIMIZERS[args.optimizer]
    optimizer = make_optimizer(model.parameters(), args.lr, args.momentum, args.weight_decay)
    try:
        train(model, optimizer, images, labels, args)
    except FloatingPointError as error:
        # The trial still reports a final result: the tuner learns that these values are bad.
        print(f"Warning: training ends early: {error}", file=sys.stderr)
    return model, test(model, test_images, test_labels, args.tta)


def set_hyperparameters(args, values, source):
    """Set args from values, a dict of hyperparameters. Error messages begin with source.

    Raises NotAllowed, a ValueError, for an unknown key, a wrong type or a value out of bounds.
    """
    if not isinstance(values, dict):
        raise NotAllowed(f"{source} is {values!r}; allowed: an object of hyperparameters")
    for key, value in values.items():
        if key not in HYPERPARAMETERS:
            allowed = ", ".join(HYPERPARAMETERS)
            raise NotAllowed(f"{source}: {key} is {value!r}; allowed keys: {allowed}")
        setattr(args, key, HYPERPARAMETERS[key].parse(value, f"{source}: {key}"))


def parse_args(argv=None):
    """Return the settings. A flag overrides --params, and --params overrides the defaults.

    If a flag or a value is not allowed, exits with status 2 and one line on stderr.
    """
    # An error is one line, without the usage.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = "Train the CNN of PyTorch's CIFAR-10 tutorial, alone or as NNI's trial."
    add = parser.add_argument
    for key, entry in HYPERPARAMETERS.items():
        add("--" + key.replace("_", "-"), **entry.flag)
    add("--params", type=data.as_path, metavar="FILE", help="a JSON file with hyperparameters")
    add("--dataset", **Choice("cifar10", "synthetic: no download", ["cifar10", "synthetic"]).flag)
    add("--data-dir", default=data.default_folder(), type=data.as_path, help="for the data set")
    add("--seed", **Integer(0, "for all random numbers", at_least=0, below=2**63).flag)
    add("--device", default=processes.default_device(), help="where to train, such as cpu or cuda")
    add("--report-every", **Integer(2000, "batches per reported mean loss", at_least=1).flag)
    add("--validate", action="store_true", help="test on held-out training images")
    add("--tta", action="store_true", help="test each image mirrored and shifted, too")
    add("--save", type=data.as_path, metavar="FILE", help="write the trained weights there")
    args = parser.parse_args(argv)
    try:
        if args.params:
            set_hyperparameters(args, hyperparameters.read(args.params), args.params)
            parser.parse_args(argv, args)  # again: flags override the file
        if args.save and not data.can_save(args.save):
            raise NotAllowed(f"--save is {args.save}; allowed: a file in a folder you may write to")
        processes.check_device(args.device)
    except (OSError, NotAllowed) as error:
        parser.error(error)
    return args


def main(argv=None):
    """Run one trial with argv, by default the command line, and return its accuracy in percent."""
    nni.silence_stdout()  # without a search NNI would print each result a second time
    args = parse_args(argv)
    processes.start()
    torch.manual_seed(args.seed)
    try:
        data_set = load_data(args)  # before the tuner is asked: a search without data is stopped
        check_data(data_set)
        if args.validate:
            data_set = data.hold_out(*data_set[:2])
        # The tuner's choice, which the first of several processes asks NNI for.
        tuned = processes.from_first(nni.get_next_parameter)
        set_hyperparameters(args, tuned, "tuner")
        if processes.is_first():
            print("Hyperparameters:", json.dumps({key: vars(args)[key] for key in HYPERPARAMETERS}))
            others = f", one of {processes.count()} processes" if processes.count() > 1 else ""
            print(f"Training on {args.device}{others}")
        with processes.limited_by_memory(args):
            model, correct = train_and_test(args, data_set)
        accuracy = 100 * correct / len(data_set[3])
        if processes.is_first():
            name = "Validation acc" if args.validate else "Acc"
            print(f"{name}: {accuracy:.3f}% ({correct}/{len(data_set[3])})")
            nni.report_final_result(accuracy)
            if args.save:
                data.save(model.cpu().state_dict(), args.save)
    except (OSError, NotAllowed) as error:  # the error names the file or the value
        sys.exit(f"train.py: error: {error}")
    processes.end()
    return accuracy


if __name__ == "__main__":
    # NNI ends a trial by SIGTERM. sys.exit() lets main() remove a half-written file.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
