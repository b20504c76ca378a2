"""Intermediate results: windows of batches, short epochs, losses that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from conftest import settings
from torch import nn

import train
from trial.optimizers import SGD

BLACK = [torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)]


@pytest.fixture
def reported(monkeypatch):
    reports = []
    monkeypatch.setattr("nni.report_intermediate_result", reports.append)
    return reports


def linear_model():
    """A model whose step takes a tenth of a millisecond."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def train_model(model, images, labels, **values):
    args = settings(**{"lr": 1e-4, "report_every": 10, "epochs": 1} | values)
    optimizer = SGD(model.parameters(), args.lr, args.momentum, args.weight_decay)
    train.train(model, optimizer, images, labels, args)


# Of 200 images, each batch size has another window: several in an epoch with a rest of batches, or
# without; one; an epoch that is shorter, whose last batch has fewer images; a single batch.
@pytest.mark.parametrize("batch_size", [4, 7, 20, 30, 1000])
def test_windows_and_losses_equal_the_tutorials(reported, capsys, batch_size):
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(10, (200,), generator=random)
    train_model(linear_model(), images, labels, batch_size=batch_size, epochs=2)

    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    expected, places = [], []
    for epoch in (1, 2):
        losses = []
        for index in torch.randperm(200).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model((images[index] / 255 - 0.5) / 0.5), labels[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        window = min(10, len(losses))
        for end in range(window, len(losses) + 1, window):
            expected.append(sum(losses[end - window : end]) / window)
            places.append(f"[{epoch}, {end:5d}]")
    assert reported == pytest.approx(expected, rel=1e-5)
    printed = zip(places, reported, strict=True)
    lines = [f"{place} loss: {loss:.3f}" for place, loss in printed]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("report_every", [10, 2000])
def test_a_loss_that_is_not_finite_ends_the_training(reported, report_every):
    model = linear_model()
    with torch.no_grad():
        model[1].weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="epoch 1, batch"):
        train_model(model, *BLACK, report_every=report_every)
    assert reported == []


def test_test_counts_correct_images():
    class Always3(nn.Module):
        def forward(self, x):
            assert not self.training
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    images = torch.zeros(2500, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(2500) % 10
    assert train.test(Always3(), images, labels) == 250
