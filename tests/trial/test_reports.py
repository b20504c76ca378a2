"""Intermediate results: windows of batches, short epochs, losses that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from torch import nn

import train
from trial.optimizers import SGD


@pytest.fixture
def reported(monkeypatch):
    reports = []
    monkeypatch.setattr("nni.report_intermediate_result", reports.append)
    return reports


def linear_model():
    """A model whose step takes a tenth of a millisecond."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def train_linear_model(images, labels, batch_size, report_every, epochs=1):
    model = linear_model()
    args = settings(batch_size=batch_size, report_every=report_every, epochs=epochs, lr=1e-4)
    train.train(model, SGD(args, model), images, labels, args)


@pytest.mark.parametrize(
    ("batch_size", "steps"),
    [
        (4, [2000, 4000, 6000, 8000, 10_000, 12_000]),  # of 12,500
        (16, [2000]),  # of 3,125
        (25, [2000]),
        (26, [1924]),  # shorter than a window; the last batch has 2 images
        (64, [782]),  # the last batch has 16 images
    ],
)
def test_reports_come_at_the_end_of_each_window(reported, capsys, batch_size, steps):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(50_000, -1, -1, -1)
    labels = torch.zeros(50_000, dtype=torch.int64)
    train_linear_model(images, labels, batch_size, 2000, epochs=2)
    printed = capsys.readouterr().out.splitlines()
    places = [f"[{epoch}, {step:5d}]" for epoch in (1, 2) for step in steps]
    assert [line.split(" loss: ")[0] for line in printed] == places
    assert [line.split(" loss: ")[1] for line in printed] == [f"{loss:.3f}" for loss in reported]


@pytest.mark.parametrize(("batch_size", "report_every"), [(4, 10), (7, 10), (30, 10), (1000, 10)])
def test_the_losses_equal_the_tutorials(reported, batch_size, report_every):
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(10, (200,), generator=random)
    train_linear_model(images, labels, batch_size, report_every, epochs=2)

    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    expected = []
    for _ in (1, 2):
        losses = []
        for index in torch.randperm(200).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model((images[index] / 255 - 0.5) / 0.5), labels[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        window = min(report_every, len(losses))
        whole = len(losses) // window * window
        expected += [sum(losses[i : i + window]) / window for i in range(0, whole, window)]
    assert reported == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("report_every", [10, 2000])
def test_a_loss_that_is_not_finite_ends_the_training(reported, report_every):
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(100, dtype=torch.int64)
    model = linear_model()
    with torch.no_grad():
        model[1].weight.fill_(torch.inf)
    args = settings(batch_size=4, report_every=report_every, epochs=1)
    with pytest.raises(FloatingPointError, match="epoch 1, batch"):
        train.train(model, SGD(args, model), images, labels, args)
    assert reported == []


def test_a_loss_of_nan_after_the_last_window_is_noticed(reported):
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(100, dtype=torch.int64)

    class BreaksAtTheEnd(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x.flatten(1)) * (1 if self.calls < 25 else torch.nan)

    model = BreaksAtTheEnd(3072, 10)
    args = settings(batch_size=4, report_every=10, epochs=1)
    with pytest.raises(FloatingPointError, match="nan at epoch 1, batch 25"):
        train.train(model, SGD(args, model), images, labels, args)
    assert len(reported) == 2


def test_test_counts_correct_images():
    class Always3(nn.Module):
        def forward(self, x):
            assert not self.training
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    images = torch.zeros(2500, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(2500) % 10
    assert train.test(Always3(), images, labels) == 250
