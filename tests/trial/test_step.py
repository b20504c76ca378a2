"""The network is the tutorial's; a training step computes the same as its loop, only faster."""

import contextlib
import functools
from unittest.mock import Mock

import few_images
import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from trial import fast, optimizers
from trial.images import augment, normalize
from trial.optimizers import orthogonalize

STEPS = 40
SCHEDULERS = {
    "constant": lambda optimizer, lr, steps: lr_scheduler.ConstantLR(optimizer, factor=1),
    "cosine": lambda optimizer, lr, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    "one_cycle": lambda optimizer, lr, steps: lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, cycle_momentum=False
    ),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


pytestmark = pytest.mark.usefixtures("kernels")


def quick(**values):
    return settings(**({"batch_size": 8, "lr": 0.01, "momentum": 0.75} | values))


def batches(images, batch_size):
    """Return a batch of indices per step. The last batch of an epoch may be shorter."""
    torch.manual_seed(1)
    epochs = -(-STEPS * batch_size // len(images)) + 1
    index = [torch.randperm(len(images)).split(batch_size) for _ in range(epochs)]
    return [batch for epoch in index for batch in epoch][:STEPS]


def optimizer_and_step(model, images, labels, args):
    """Return the optimizer that args names, and train.py's step as a function of the index."""
    kind = optimizers.OPTIMIZERS[args.optimizer]
    optimizer = kind(model.parameters(), args.lr, args.momentum, args.weight_decay)
    return optimizer, functools.partial(train.train_step, model, optimizer, images, labels, args)


def losses_and_weights(args, samples, graph=True, lr_type=torch.float64):
    """Train with train.py's step; return the loss of each step and the trained parameters."""
    images, labels = samples
    torch.manual_seed(0)
    model = train.Net().to(images.device)
    fast.prepare(model, images.device, args.batch_size)
    optimizer, learn = optimizer_and_step(model, images, labels, args)
    if images.is_cuda and graph:
        learn = fast.as_cuda_graph(learn, args.batch_size, images.device)
    losses = []
    schedule = optimizers.LR_SCHEDULES[args.lr_schedule]
    for done, index in enumerate(batches(images, args.batch_size)):
        rate = schedule(args.lr, done, STEPS)
        optimizer.lr.fill_(torch.tensor(rate, dtype=lr_type))
        losses.append(learn(index.to(images.device)).item())
    return losses, list(model.parameters())


def reference(args, samples):
    """Train with torch.optim's class and the tutorial's loop; return as above."""
    images, labels = samples
    torch.manual_seed(0)
    model = train.Net()
    momentum = {"momentum": args.momentum}
    if args.optimizer != "SGD":
        momentum = {"betas": (args.momentum, 0.999)}
    kind = getattr(torch.optim, args.optimizer)
    optimizer = kind(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, **momentum)
    scheduler = SCHEDULERS[args.lr_schedule](optimizer, args.lr, STEPS)
    losses = []
    for index in batches(images, args.batch_size):
        optimizer.zero_grad()
        inputs = (images[index] / 255 - 0.5) / 0.5
        loss = F.cross_entropy(model(inputs), labels[index], label_smoothing=args.label_smoothing)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) < STEPS:
            scheduler.step()
    return losses, list(model.parameters())


def assert_agree(one, other, tolerance=1e-6):
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    for ours, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=tolerance)


@pytest.fixture
def double():
    """Compute with 64 bits.

    With 32, the result of many steps of Adam depends on the kernels that torch chooses. With 64, it
    depends only on the computation.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def samples():
    return [tensor[:100] for tensor in few_images.make()[:2]]


def test_the_network_and_its_initial_weights_are_the_tutorials():
    torch.manual_seed(3)
    net = train.Net()
    torch.manual_seed(3)
    layers = {"conv1": nn.Conv2d(3, 6, 5), "conv2": nn.Conv2d(6, 16, 5), "fc1": nn.Linear(400, 120)}
    layers |= {"fc2": nn.Linear(120, 84), "fc3": nn.Linear(84, 10)}
    theirs = nn.ModuleDict(layers).state_dict()
    assert net.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in net.state_dict().items())
    assert net(torch.zeros(7, 3, 32, 32)).shape == (7, 10)


def test_normalize_is_the_tutorials():
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = (pixels.double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(normalize(pixels).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 4, "momentum": 0.0},
        {"batch_size": 8, "lr_schedule": "cosine", "weight_decay": 0.05},
        {"batch_size": 16, "lr_schedule": "one_cycle", "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])  # those that torch has, too
def test_a_step_computes_the_same_as_the_tutorials_loop(samples, double, optimizer, values):
    args = quick(optimizer=optimizer, **values)  # 16 images have the layout of oneDNN
    assert_agree(losses_and_weights(args, samples), reference(args, samples), tolerance=1e-9)


@pytest.mark.parametrize("lr_schedule", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 11, 1000])
def test_a_schedule_is_torchs_scheduler(lr_schedule, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = SCHEDULERS[lr_schedule](optimizer, 0.5, steps)
    expected = []
    for _ in range(steps):
        expected += scheduler.get_last_lr()
        optimizer.step()
        if len(expected) < steps:
            scheduler.step()
    schedule = optimizers.LR_SCHEDULES[lr_schedule]
    rates = [schedule(0.5, done, steps) for done in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert all(0 < rate <= 0.5 for rate in rates)


def test_orthogonalize_keeps_the_singular_vectors_and_makes_the_values_about_1():
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonalize(matrix) @ right.T
    assert torch.all((values.diag() > 0.65) & (values.diag() < 1.25))
    torch.testing.assert_close(values, values.diag().diag(), rtol=0, atol=1e-9)


def test_orthogonalize_takes_any_shape_and_scale():
    matrix = torch.randn(20, 50, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T)
    torch.testing.assert_close(orthogonalize(1e6 * matrix), orthogonalize(matrix))
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_muon_follows_its_definition(double):
    args = quick(optimizer="Muon", weight_decay=0.1)
    torch.manual_seed(0)
    model = train.Net().to(memory_format=torch.channels_last)
    optimizer = optimizers.Muon(model.parameters(), args.lr, args.momentum, args.weight_decay)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for _ in range(2):
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn_like(parameter)
            momenta[place] = args.momentum * momenta[place] + parameter.grad
            change = parameter.grad + args.momentum * momenta[place]
            if parameter.ndim > 1:
                matrix = orthogonalize(change.reshape(len(change), -1))
                change = matrix.reshape(change.shape)
            weights[place] -= args.lr * (change + args.weight_decay * weights[place])
        optimizer.step()
    for ours, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_each_image_has_its_own_shift_and_mirroring():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")[0]
    windows = [padded[:, top : top + 32, left : left + 32] for top in range(5) for left in range(5)]
    allowed = torch.stack([*windows, *(window.flip(2) for window in windows)])
    augmented = augment(image.expand(2000, -1, -1, -1), 2, 2000)
    which = (augmented[:, None, 0, ::5, ::5] == allowed[None, :, 0, ::5, ::5]).flatten(2).all(2)
    assert which.sum(1).tolist() == [1] * 2000
    counts = which.sum(0)
    assert counts.min() >= 15  # 40 are expected of each of the 50
    assert counts.max() <= 75
    assert torch.equal(augmented, allowed[which.int().argmax(1)])


def test_a_step_augments_when_asked_to(samples):
    plain, augmented = (losses_and_weights(quick(augment=pixels), samples)[0] for pixels in (0, 2))
    assert plain[0] != augmented[0]


class RecordedGraph:
    """Stands in for CUDA's graphs: replay() runs the recorded work again."""

    recording = None

    def __init__(self):
        self.content = []

    def replay(self):
        for work in self.content:
            work()

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph):
        cls.recording = graph.content
        yield
        cls.recording = None

    @classmethod
    def run(cls, work):
        work() if cls.recording is None else cls.recording.append(work)


@pytest.mark.parametrize("batch_size", [3, 10])
def test_a_cuda_graph_runs_each_batch_once(monkeypatch, batch_size):
    monkeypatch.setattr("torch.cuda.Stream", Mock)
    monkeypatch.setattr("torch.cuda.current_stream", Mock)
    monkeypatch.setattr("torch.cuda.stream", contextlib.nullcontext)
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", RecordedGraph.record)
    seen = []

    def noted_step(index):
        total = torch.zeros((), dtype=torch.int64)

        def work():
            seen.append(index.tolist())
            total.copy_(index.sum())

        RecordedGraph.run(work)
        return total

    replayed = fast.as_cuda_graph(noted_step, batch_size, "cpu")
    expected = [index.tolist() for index in batches(range(20), batch_size)]
    results = [replayed(torch.tensor(index)).item() for index in expected]
    assert seen == expected
    assert results == [sum(index) for index in expected]


class Capture(TorchDispatchMode):
    """Stands in for the recording of a CUDA graph: all work is on the device, no value is read.

    The device is torch's meta: reading a value there raises an error.
    """

    def __torch_dispatch__(self, work, types, args=(), kwargs=None):
        # Fused optimizers do not run on meta. They return nothing.
        result = None if "_fused_" in str(work) else work(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), work
        return result


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_a_cuda_graph_can_record_a_step(optimizer):
    args = quick(optimizer=optimizer, weight_decay=0.01, label_smoothing=0.1, augment=2)
    with torch.device("meta"):
        images, labels = torch.empty(99, 3, 32, 32, dtype=torch.uint8), torch.empty(99).long()
        index, model = torch.empty(args.batch_size).long(), train.Net()
    _, learn = optimizer_and_step(model, images, labels, args)
    with Capture():
        learn(index)


@needs_cuda
@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_a_cuda_graph_computes_the_same_as_the_step(samples, double, optimizer):
    on_gpu = [tensor.cuda() for tensor in samples]
    args = quick(optimizer=optimizer, weight_decay=0.01, label_smoothing=0.1)
    args.lr_schedule = "one_cycle"
    replayed = losses_and_weights(args, on_gpu)
    assert_agree(replayed, losses_and_weights(args, on_gpu, graph=False))
    # A GPU's learning rate has 32 bits, and AdamW is off by 0.1 at the end if the rate is by 1e-10.
    assert_agree(replayed, losses_and_weights(args, samples, lr_type=torch.float32))


@needs_cuda
def test_nothing_waits_for_the_gpu_between_two_reports(samples):
    images, labels = (tensor.cuda() for tensor in samples)
    model = train.Net().cuda()
    args = quick(augment=2)
    _, learn = optimizer_and_step(model, images, labels, args)
    learn = fast.as_cuda_graph(learn, args.batch_size, images.device)
    running_loss = torch.zeros((), device=images.device)
    index = [batch.cuda() for batch in batches(images, 8)]
    for each in index[:5]:  # until the graph is recorded
        running_loss += learn(each)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in index[5:]:
            running_loss += learn(each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_trial_leaves_room_for_others_on_its_gpu(run):
    code = "import torch, train; train.main(['--dataset', 'synthetic', '--epochs', '1'])"
    result = run(code=f"{code}; print(torch.cuda.max_memory_reserved())")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 2**29  # bytes; CUDA itself takes about as much again


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_or_unused_parameters_do_not_change(samples, name):
    torch.manual_seed(0)
    model = train.Net()
    model.unused = nn.Linear(2, 2)
    model.conv1.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = (tensor[:64] for tensor in samples)
    _, learn = optimizer_and_step(model, images, labels, quick(optimizer=name))
    for index in batches(images, 8)[:3]:
        learn(index)
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same == {"conv1.weight", "conv1.bias", "unused.weight", "unused.bias"}
