"""The README's code: another network and another data set, and a saved model in use."""

import difflib
import json
import re
import shutil

import few_images
import pytest
import torch
from conftest import ROOT
from experiment import Experiment, accuracy, processes_at
from PIL import Image

import train
from trial import images


def readme_code(section):
    """Return the first block of Python in this section of the README."""
    text = (ROOT / "README.md").read_text().split(f"## {section}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_readmes_code_classifies_an_image(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--dataset=synthetic", "--batch-size=100", "--lr=0.05", "--save=model.pt").stdout
    net = train.Net()
    net.load_state_dict(torch.load("model.pt"))
    examples = few_images.make()[2][:5]
    classes = net(images.normalize(examples)).argmax(1)
    assert len(classes.unique()) > 1
    words = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for image, number in zip(examples, classes, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save("image.png")
        exec(readme_code("From a search to a model"), {})
        assert capsys.readouterr().out == f"{words[number]}\n"


def changed(place, change):
    data_set = few_images.make()
    data_set[place] = change(data_set[place])
    return data_set


RIGHT = "(1000, 3, 32, 32), torch.int64 (1000,), torch.uint8 (200, 3, 32, 32), torch.int64 "


@pytest.mark.parametrize(
    ("data_set", "line"),
    [
        (
            None,
            "load_data() returns NoneType; allowed: for training and for test, images",
        ),
        ((1, 2, 3), "load_data() returns int, int, int; allowed"),
        (changed(0, torch.Tensor.float), f"load_data() returns torch.float32 {RIGHT}"),
        (changed(1, torch.Tensor.numpy), "torch.uint8 (1000, 3, 32, 32), int64 (1000,), "),
        (changed(2, lambda images: images[:, 0]), "torch.uint8 (200, 32, 32), "),
        (changed(3, lambda labels: labels[:, None]), f"{RIGHT}(200, 1); allowed"),
        (changed(3, lambda labels: labels[:5]), f"{RIGHT}(5,); allowed"),
        (
            changed(1, lambda labels: labels + 1),
            "(1, 10) for an image, with labels 1 to 10; allowed",
        ),
        (
            changed(3, lambda labels: labels + 1),
            "(1, 10) for an image, with labels 1 to 10; allowed",
        ),
        (changed(1, lambda labels: labels - 1), "with labels -1 to 8; allowed"),
    ],
)
def test_wrong_data_ends_in_one_line(main, monkeypatch, data_set, line):
    monkeypatch.setattr(train, "load_data", lambda args: data_set)
    result = main("--device", "cpu")
    assert result.returncode == 1
    assert result.stderr.startswith("train.py: error: ")
    assert line in result.stderr
    assert "; allowed: " in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (lambda self, x: (x, x), "Net returns tuple for an image"),
        (
            lambda self, x: x.flatten(1)[:, :9],
            "Net returns torch.float32 (1, 9) for an image, with ",
        ),
    ],
)
def test_a_wrong_network_ends_in_one_line(main, monkeypatch, forward, line):
    monkeypatch.setattr(train.Net, "forward", forward)
    assert main("--dataset", "synthetic").stderr.startswith(f"train.py: error: {line}")


@pytest.mark.parametrize(
    ("size", "flags", "line"),
    [
        (16, ["--augment", "16"], "augment shifts by 16 pixels; allowed: < 16, the images' size"),
        (2, ["--tta"], "--tta shifts by 2 pixels; allowed: < 2, the images' size"),
    ],
)
def test_images_that_are_too_small_end_the_trial_before_it_trains(
    main, monkeypatch, size, flags, line
):
    small = [x[:, :, :size, :size] if x.ndim == 4 else x for x in few_images.make()]
    monkeypatch.setattr(train, "load_data", lambda args: small)
    monkeypatch.setattr(train.Net, "forward", lambda self, x: x.flatten(1)[:, :10])
    result = main(*flags)
    assert result.stderr == f"train.py: error: {line}\n"
    assert " loss: " not in result.stdout


def test_validation_never_sees_the_test_images(main, monkeypatch):
    """Whatever load_data() does with args.validate."""
    images, labels, test_images, test_labels = few_images.make()
    data_set = [images, labels, test_images, test_labels - 1]  # one is -1, which is refused
    monkeypatch.setattr(train, "load_data", lambda args: data_set)
    result = main("--batch-size", "128", "--epochs", "1", "--validate")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("Validation acc: ")
    assert result.stdout.splitlines()[-1].endswith("/100)")


@pytest.mark.slow
def test_the_readmes_own_network_and_data_are_searched(tmp_path, home, environment):
    code = readme_code("Your own network and data")
    load_data, net = re.search(r"(def load_data.*)(class Net.*)", code, re.DOTALL).groups()

    project = tmp_path / "project"
    project.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    for folder in ("trial", "nnisearch"):
        shutil.copytree(ROOT / folder, project / folder)
    before = after = (ROOT / "train.py").read_text()
    for start, code in (("def load_data", load_data), ("class Net", net)):
        replaced = re.search(rf"{start}.*?\n\n\n", after, re.DOTALL)[0]
        after = after.replace(replaced, f"{code.strip()}\n\n\n")
    (project / "train.py").write_text(after)
    changes = difflib.ndiff(before.splitlines(), after.splitlines())
    assert sum(change.startswith("+ ") for change in changes) < 30

    search = Experiment(
        ROOT / "configs" / "demo.yml",
        home,
        environment | {"PYTHONPATH": ""},
        [project / "search.py"],
        trialCommand="OMP_NUM_THREADS=1 python3 train.py",
        trialCodeDirectory=str(project),
        tuner={"name": "Random"},
        maxTrialNumber=1,
    )
    (trial,) = search.wait(120)
    assert trial["status"] == "SUCCEEDED", search.trial_file(trial, "stderr")
    assert "/297)" in search.trial_file(trial, "trial.log")
    assert accuracy(trial) > 5
    assert json.loads(trial["hyperParameters"][0])["parameters"]
    assert search.stop() == []
    assert processes_at(home) == []
