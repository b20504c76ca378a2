"""Train the CNN of PyTorch's CIFAR-10 classifier tutorial, by itself or as a trial of NNI.

    python train.py                  # the baseline: the tutorial's hyperparameters
    python search.py                 # a search: many trials, hyperparameters from NNI's tuner
    torchrun --standalone --nproc-per-node=gpu train.py      # the baseline on several GPUs

A trial reports the mean training loss of every 2,000 batches as intermediate results, and the
accuracy on the test images, in percent, as its final result. Network and training follow
https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html. Read main() first, at the
end: it is the whole trial in order.
"""

import trial.start  # before torch and NNI: it makes them load faster

import argparse
import functools
import json
import math
import signal
import sys

import nni
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from trial import batch, data, hyperparameters, optimizers, processes
from trial.hyperparameters import Choice, Integer, NotAllowed, Number

try:
    from trial import fast
except ImportError:  # trial/fast.py may be deleted: training computes the same, more slowly
    fast = None

# A search space may use these keys. Each is a flag, too: batch_size is --batch-size.
HYPERPARAMETERS = {
    "batch_size": Integer(4, "how many images a step learns from", at_least=1),
    "lr": Number(0.001, "the learning rate: how far a step goes", above=0),
    "epochs": Integer(2, "how often each training image is learned from", at_least=1),
    "optimizer": Choice("SGD", "how a step uses the gradients", optimizers.OPTIMIZERS),
    "momentum": Number(0.9, "how much past gradients count; Adam's beta1", at_least=0, below=1),
    "weight_decay": Number(0.0, "how strongly a step pulls the weights to 0", at_least=0),
    "label_smoothing": Number(0.0, "how much of a label all classes share", at_least=0, below=1),
    "lr_schedule": Choice("constant", "how the learning rate changes", optimizers.LR_SCHEDULES),
    "augment": Integer(0, "mirror images and shift them by up to N pixels", at_least=0, at_most=16),
}


def load_data(args):
    """Return training images, their labels, test images, their labels.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,). Raises OSError if the data cannot be loaded.
    """
    if args.dataset == "synthetic":
        data_set = data.make_synthetic()
    else:
        data_set = data.load_cifar10(args.data_dir)
    return data.hold_out(*data_set[:2]) if args.validate else data_set


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
        # The tutorial calls relu before pool: the same result, but relu has four times the work.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train_step(model, optimizer, images, labels, args, index):
    """Learn from one batch, the images with these indices; return its mean loss, a tensor ().

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), index: int64 (n,), on the model's device. The
    loss stays on the device: reading it at every step would make Python wait for the GPU. On a GPU
    this step is recorded once and replayed as a CUDA graph: no print, no .item(). Of several
    processes, each learns from its share of the batch and returns its share of the loss.
    """
    inputs, targets = batch.make(images, labels, index, args.augment)
    optimizer.zero_grad()
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=args.label_smoothing)
    loss = loss / len(index)  # the mean of the whole batch; this process may have only a share
    loss.backward()
    processes.sum_gradients(model)  # does nothing for a single process
    optimizer.step()
    return loss.detach()


def train(model, optimizer, images, labels, args):
    """Train for args.epochs; print and report to NNI the mean loss of each window of batches.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), on the model's device. A window is
    args.report_every batches, or the whole epoch if that is shorter. The batches after the last
    whole window are not reported, as in the tutorial. Raises FloatingPointError at the end of a
    window if the loss is not finite.
    """
    model.train()
    # learn(index) is train_step() with all other arguments filled in.
    learn = functools.partial(train_step, model, optimizer, images, labels, args)
    batch_size = min(args.batch_size, len(images))
    # A GPU computes faster than Python can start the parts of a step. A CUDA graph, a recorded
    # step, starts them all at once. Several processes exchange gradients within a step: no graph.
    if fast and images.is_cuda and processes.count() == 1:
        learn = fast.as_cuda_graph(learn, batch_size, images.device)
    steps = args.epochs * math.ceil(len(images) / batch_size)
    rates = optimizers.learning_rates(args, steps)  # one for each step
    running_loss = torch.zeros((), device=images.device)
    for epoch in range(1, args.epochs + 1):
        batches = torch.randperm(len(images)).to(images.device).split(batch_size)
        window = min(args.report_every, len(batches))
        # disable=None shows the progress bar on a terminal only, so never in a trial.
        disable = None if processes.is_first() else True
        progress = tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=disable)
        for number, index in enumerate(progress, start=1):
            optimizer.lr.fill_(next(rates))  # in place: a graph reads the same memory each time
            running_loss += learn(index)
            if number % window == 0 or number == len(batches):
                mean_loss = processes.total(running_loss) / window
                running_loss.zero_()
                if not math.isfinite(mean_loss):
                    place = f"epoch {epoch}, batch {number}"
                    raise FloatingPointError(f"the loss is {mean_loss} at {place}")
                if number % window == 0 and processes.is_first():
                    tqdm.write(f"[{epoch}, {number:5d}] loss: {mean_loss:.3f}")
                    nni.report_intermediate_result(mean_loss)


@torch.inference_mode()
def test(model, images, labels, tta=False):
    """Return how many of the images (uint8, (N, 3, 32, 32)) get their label (int64, (N,)).

    With tta, test-time augmentation, the logits of an image are summed over its batch.views().
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    images, labels = processes.own_share(images), processes.own_share(labels)
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        inputs = batch.normalize(x)
        logits = sum(model(view) for view in batch.views(inputs)) if tta else model(inputs)
        correct += (logits.argmax(1) == y).sum()
    return processes.total(correct)


def train_and_test(args, data_set):
    """Train and test on what load_data() returns; return the model and test()'s number."""
    train_images, train_labels, test_images, test_labels = (x.to(args.device) for x in data_set)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every device
    model = Net().to(args.device)
    if fast:
        fast.prepare(model, train_images.device, args.batch_size // processes.count())
    optimizer = optimizers.OPTIMIZERS[args.optimizer](args, model)
    try:
        train(model, optimizer, train_images, train_labels, args)
    except FloatingPointError as error:
        # The trial goes on to its final result: the tuner learns that these values are bad.
        if processes.is_first():
            print(f"Warning: training ends early: {error}", file=sys.stderr)
    return model, test(model, test_images, test_labels, args.tta)


def set_hyperparameters(args, values, source):
    """Set values, a dict of hyperparameters, in args. source names where they come from.

    Raises NotAllowed, a ValueError, for an unknown key, a wrong type or a value out of bounds.
    """
    if not isinstance(values, dict):
        raise NotAllowed(f"{source} is {values!r}; allowed: an object of hyperparameters")
    for key, value in values.items():
        if key not in HYPERPARAMETERS:
            keys = ", ".join(HYPERPARAMETERS)
            raise NotAllowed(f"{source}: {key} is {value!r}; allowed keys: {keys}")
        setattr(args, key, HYPERPARAMETERS[key].parse(value, f"{source}: {key}"))


def parse_args(argv):
    """Return the settings. A hyperparameter's flag wins over --params, which wins over its default.

    Exits with status 2, and one line on stderr, for a flag or a value that is not allowed.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],  # python -OO has none
        usage=argparse.SUPPRESS,  # an error is one line, without the usage
        allow_abbrev=False,
    )
    add = parser.add_argument
    for key, entry in HYPERPARAMETERS.items():
        flag = "--" + key.replace("_", "-")
        text = f"{entry.meaning}: {entry.allowed} (default: {entry.default})".replace("%", "%%")
        add(flag, type=entry.from_text, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    add("--params", type=data.as_path, metavar="FILE", help="a JSON file with hyperparameters")
    add("--dataset", default="cifar10", choices=data.DATASETS, help="synthetic: no download")
    add("--data-dir", default=data.default_folder(), type=data.as_path, help="holds CIFAR-10")
    add("--seed", type=int, default=0, help="draws the initial weights and the images' order")
    add("--device", default=processes.default_device(), help="where to train, as torch names it")
    add("--report-every", type=int, default=2000, help="batches per reported mean loss")
    add("--validate", action="store_true", help="test on held-out training images")
    add("--tta", action="store_true", help="test each image mirrored and shifted, too")
    add("--save", type=data.as_path, metavar="FILE", help="write the trained state dict there")
    args, unknown = parser.parse_known_args(argv)
    flags = {key: vars(args).pop(key) for key in HYPERPARAMETERS if key in args}  # those given
    for key, entry in HYPERPARAMETERS.items():
        setattr(args, key, entry.kind(entry.default))  # a number's default may be 0 instead of 0.0
    try:
        if unknown:
            words = " ".join(" ".join(unknown).split())  # one line
            raise NotAllowed(f"unknown: {words}; allowed: the flags in --help")
        if args.params:
            set_hyperparameters(args, hyperparameters.read(args.params), args.params)
        set_hyperparameters(args, flags, "command line")
        if not 0 <= args.seed < 2**63:
            raise NotAllowed(f"--seed is {args.seed}; allowed: an integer from 0 to 2**63 - 1")
        if args.report_every < 1:
            raise NotAllowed(f"--report-every is {args.report_every}; allowed: an integer >= 1")
        if args.save and (args.save.is_dir() or not args.save.absolute().parent.is_dir()):
            raise NotAllowed(f"--save is {args.save}; allowed: a file in a folder that exists")
        processes.check_device(args.device)
    except (OSError, NotAllowed) as error:
        parser.error(error)
    return args


def main(argv=None):
    """Run one trial with argv, by default the command line, and return its accuracy in percent."""
    nni.silence_stdout()  # otherwise NNI prints each result, too, if it runs without a search
    args = parse_args(argv)
    processes.start()
    torch.manual_seed(args.seed)
    try:
        data_set = load_data(args)  # first: search.py waits for the download until NNI is asked
        # The tuner's choice. Only the first process asks NNI, and tells the others.
        tuned = nni.get_next_parameter() if processes.is_first() else None
        set_hyperparameters(args, processes.from_first(tuned), "tuner")
        processes.check_batch_size(args.batch_size)
        if processes.is_first():
            print("Hyperparameters:", json.dumps({key: vars(args)[key] for key in HYPERPARAMETERS}))
            print(f"Training on {args.device}{processes.note()}")
        with batch.limited_by_memory(args):
            model, correct = train_and_test(args, data_set)
        accuracy = 100 * correct / len(data_set[3])
        if processes.is_first():
            name = "Validation acc" if args.validate else "Acc"
            print(f"{name}: {accuracy:.3f}% ({correct}/{len(data_set[3])})")
            nni.report_final_result(accuracy)
            if args.save:
                state = model.cpu().state_dict()
                data.save(state, args.save, state.values())
    except (OSError, NotAllowed) as error:  # of a file or a value, which the error names
        sys.exit(f"train.py: error: {error}")
    processes.end()
    return accuracy


if __name__ == "__main__":
    # NNI kills a trial by SIGTERM. Exiting lets main() remove a file that it has half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
