"""train.py as it is started: by hand, on a terminal, and by NNI."""

import fcntl
import itertools
import json
import pty
import runpy
import struct
import sys
import termios
import types

import pytest
import tiny_cifar10
import torch
from conftest import BASELINE, ROOT, as_process
from forked import SUPPORT
from tiny_cifar10 import assert_equals_torchvisions, names

import train
from trial import data
from trial.images import normalize, views

QUICK = ["--dataset", "synthetic", "--batch-size", "128", "--lr", "0.05", "--epochs", "1"]


@pytest.fixture
def trial(main, monkeypatch):
    """Run a trial with the tuner's values and flags; return its end and the metrics it sent."""

    def trial(tuned, *flags):
        sent = []

        def send_metric(text):
            metric = json.loads(text)
            sent.append(metric | {"value": json.loads(metric["value"])})

        given = {"parameter_id": 7, "parameters": tuned}
        search = types.SimpleNamespace(get_next_parameter=lambda: given, send_metric=send_metric)
        monkeypatch.setattr("nni.trial.platform", search)
        monkeypatch.setattr("nni.trial._intermediate_seq", 0)
        return main(*flags), sent

    return trial


def accuracy(printed):
    """Return the percentage in the last line that a run has printed."""
    return float(printed.splitlines()[-1].split("%")[0].removeprefix("Acc: "))


def losses(printed):
    """Return the losses that a run has printed."""
    return [float(line.split()[-1]) for line in printed.splitlines() if " loss: " in line]


def test_a_run_by_hand(run, environment, tmp_path, synthetic):
    model = tmp_path / "model.pt"
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"  # torch's threads print their settings
    result = run(*QUICK, "--save", model)
    assert result.returncode == 0, result.stderr
    parameters, device, loss, accuracy = result.stdout.splitlines()
    expected = BASELINE | {"batch_size": 128, "lr": 0.05, "epochs": 1}
    assert json.loads(parameters.removeprefix("Hyperparameters: ")) == expected
    assert device == f"Training on {train.parse_args([]).device}"
    assert loss.startswith("[1,    79] loss: 2.")
    assert "%|" not in result.stderr  # no progress bar without a terminal
    if "GOMP_SPINCOUNT" in result.stderr:  # the threads are those of GNU's OpenMP
        assert "GOMP_SPINCOUNT = '10000'" in result.stderr
    assert list(tmp_path.iterdir()) == [model]

    net = train.Net()
    net.load_state_dict(torch.load(model, weights_only=True))
    correct = train.test(net, *synthetic[2:])
    assert accuracy == f"Acc: {correct / 20:.3f}% ({correct}/2000)"


def test_a_seed_repeats_a_run_on_the_cpu_to_the_last_digit(main, tmp_path):
    outputs = []
    for name, seed in (("a", 5), ("c", 6), ("b", 5)):
        flags = ("--device", "cpu", "--seed", seed, "--save", tmp_path / name, "--report-every", 3)
        outputs.append(main(*QUICK, *flags).stdout)
    weights = [torch.load(tmp_path / name, weights_only=True) for name in "abc"]
    assert outputs[0] == outputs[2] != outputs[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not any(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_good_hyperparameters_beat_the_baseline_and_bad_ones(main, monkeypatch, synthetic):
    half = [tensor[: len(tensor) // 2] for tensor in synthetic]
    monkeypatch.setattr(data, "make_synthetic", lambda: half)
    baseline, better, bad = (
        accuracy(main("--dataset", "synthetic", *flags).stdout)
        for flags in (
            [],
            ["--batch-size", "64", "--lr", "0.01", "--optimizer", "Muon"],
            ["--batch-size", "128", "--lr", "0.0001"],
        )
    )
    assert 25 < baseline < 60
    assert better > baseline + 15
    assert bad < 20


def test_a_progress_bar_on_a_terminal(main, monkeypatch):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
    with open(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        assert main(*QUICK).returncode == 0
    with open(controller, "rb", 0) as shown:
        assert b"epoch 1: " in shown.read(4096)


def test_reports_as_nni_sees_them(trial):
    result, sent = trial({"batch_size": 64, "epochs": 2, "lr": 0.05}, *QUICK, "--report-every", 6)
    assert [metric["type"] for metric in sent] == ["PERIODICAL"] * 4 + ["FINAL"]
    assert [metric["sequence"] for metric in sent] == [0, 1, 2, 3, 0]
    assert {metric["parameter_id"] for metric in sent} == {7}
    assert all(type(metric["value"]) is float for metric in sent)
    *reported, accuracy = (metric["value"] for metric in sent)
    assert losses(result.stdout) == [round(loss, 3) for loss in reported]
    assert result.stdout.splitlines()[-1].startswith(f"Acc: {accuracy:.3f}% (")
    assert result.stderr == ""


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_loss_of_nan_ends_in_a_finite_final_result(trial, optimizer):
    result, sent = trial({"lr": 1e30, "optimizer": optimizer}, *QUICK, "--report-every", 4)
    assert result.returncode == 0
    assert "Warning: training ends early: the loss is nan at epoch 1, batch 4" in result.stderr
    (final,) = sent
    assert final["type"] == "FINAL"
    assert 0 <= final["value"] <= 100


def test_the_tuners_mistake_ends_the_trial(trial):
    result, _ = trial({"lr": -1}, *QUICK)
    assert result.returncode == 1
    line = "train.py: error: tuner: lr is -1; allowed: a finite number > 0\n"
    assert result.stderr == line


def test_a_data_folder_that_is_a_file_ends_the_trial(main, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = main("--data-dir", tmp_path / "file")
    assert result.returncode == 1
    assert f"train.py: error: CIFAR-10 is missing or damaged in {tmp_path}/file" in result.stderr
    assert "point --data-dir or CIFAR10_DIR at a folder" in result.stderr


def test_data_dir_is_beside_the_script_or_from_the_environment(monkeypatch):
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    assert train.parse_args([]).data_dir == ROOT / "data"
    monkeypatch.setenv("CIFAR10_DIR", "images")
    assert str(train.parse_args([]).data_dir) == "images"
    assert str(train.parse_args(["--data-dir", "elsewhere"]).data_dir) == "elsewhere"


def test_a_path_may_begin_with_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR10_DIR", "~/images")
    (tmp_path / "best.json").write_text('{"lr": 0.5}')
    args = train.parse_args(["--params=~/best.json", "--save=~/model.pt"])
    assert (args.data_dir, args.save) == (tmp_path / "images", tmp_path / "model.pt")
    assert train.parse_args(["--data-dir=~/data"]).data_dir == tmp_path / "data"
    assert args.lr == 0.5


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator here")
def test_an_accelerator_learns_what_the_cpu_learns(main, monkeypatch, synthetic):
    monkeypatch.setattr(data, "make_synthetic", lambda: synthetic)
    devices = ["cpu", torch.accelerator.current_accelerator()]
    runs = [main(*QUICK, "--device", device, "--report-every", "20") for device in devices]
    assert losses(runs[0].stdout) == pytest.approx(losses(runs[1].stdout), abs=0.05)


def test_a_real_trial(main, monkeypatch, cifar10_dir):
    load = data.load_cifar10
    monkeypatch.setattr(data, "load_cifar10", lambda folder: [x[:10_000] for x in load(folder)])
    flags = ["--batch-size", "128", "--lr", "0.02", "--epochs", "1", "--optimizer", "Muon"]
    assert accuracy(main(*flags, "--device", "cpu", "--data-dir", cifar10_dir).stdout) > 40
    tensors = load(cifar10_dir)  # from the cache
    assert [len(tensor) for tensor in tensors] == [50_000, 50_000, 10_000, 10_000]
    assert_equals_torchvisions(tensors, cifar10_dir)


def test_tta_adds_the_logits_of_the_views(synthetic):
    torch.manual_seed(0)
    net = train.Net().eval()
    images = synthetic[2][:100]
    x = normalize(images)
    with torch.no_grad():
        plain, averaged = net(x).argmax(1), (sum(net(view) for view in views(x)) / 50).argmax(1)
    assert (plain != averaged).any()
    assert train.test(net, images, plain) == 100
    assert train.test(net, images, averaged, tta=True) == 100
    assert train.test(net, images.flip(3), averaged, tta=True) == 100


def test_the_views_are_25_shifts_and_their_mirror_images():
    images = torch.randn(3, 2, 8, 8)
    fifty = views(images)
    assert len(fifty) == len({view.numpy().tobytes() for view in fifty}) == 50
    assert torch.equal(fifty[12], images)
    places = itertools.product(range(5), range(5))
    for view, (top, left) in zip(fifty[:25], places, strict=True):  # inside, what is not reflected
        inner = images[:, :, top : top + 4, left : left + 4]
        assert torch.equal(view[:, :, 2:6, 2:6], inner)
    for view, mirrored in zip(fifty[:25], fifty[25:], strict=True):
        assert torch.equal(view.flip(3), mirrored)


def test_a_trial_has_its_data_before_it_asks_for_hyperparameters(main, monkeypatch):
    make_synthetic, order = data.make_synthetic, []
    monkeypatch.setattr(data, "make_synthetic", lambda: order.append("data") or make_synthetic())
    monkeypatch.setattr("nni.get_next_parameter", lambda: order.append("NNI") or {})
    assert main(*QUICK).returncode == 0
    assert order == ["data", "NNI"]


def test_training_computes_the_same_without_fast_py(main, monkeypatch, capsys):
    # Muon sees the memory layout of the weights; its losses change within a few steps.
    flags = [*QUICK, "--optimizer", "Muon", "--device", "cpu", "--report-every", "2"]
    faster = main(*flags)
    monkeypatch.setitem(sys.modules, "trial.fast", None)  # as if the file were deleted
    monkeypatch.delattr("trial.fast")
    slower = as_process(capsys, runpy.run_path(ROOT / "train.py")["main"], flags)
    assert slower.returncode == 0, slower.stderr
    assert losses(faster.stdout) == pytest.approx(losses(slower.stdout), abs=1e-3)


@pytest.mark.slow
def test_a_trial_imports_no_slow_module(run, archive, tmp_path):
    """Each optimizer and schedule, and a cache of CIFAR-10: no torch.compile, pandas, torchvision.

    The garbage collector is on again. The import of train.py prints and writes nothing.
    """
    tiny_cifar10.write(tmp_path / "data")
    data.load_cifar10(tmp_path / "data")
    result = run(tmp_path / "data", program=SUPPORT / "lean_imports.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("imported\n")
    assert result.stderr.startswith("imported\n")
    assert names(tmp_path) == ["archive", "data"]
