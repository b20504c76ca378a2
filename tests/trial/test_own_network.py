"""The README's code: another network and another data set, and a saved model in use."""

import difflib
import json
import re
import shutil

import few_images
import pytest
import torch
from conftest import ROOT
from experiment import SEARCH, Experiment, accuracy, processes_at
from PIL import Image

import train
from trial import batch


def readme_code(section):
    """Return the first block of Python in this section of the README."""
    text = (ROOT / "README.md").read_text().split(f"## {section}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_readmes_code_classifies_an_image(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--dataset=synthetic", "--batch-size=100", "--lr=0.05", "--save=model.pt").stdout
    net = train.Net()
    net.load_state_dict(torch.load("model.pt"))
    images = few_images.make()[2][:5]
    classes = net(batch.normalize(images)).argmax(1)
    assert len(classes.unique()) > 1
    words = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for image, number in zip(images, classes, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save("image.png")
        exec(readme_code("From a search to a model"), {})
        assert capsys.readouterr().out == f"{words[number]}\n"


@pytest.mark.parametrize(
    ("place", "wrong", "line"),
    [
        (0, torch.Tensor.float, "training images are torch.float32 (1000, 3, 32, 32)"),
        (1, torch.Tensor.numpy, "training labels are a ndarray; allowed: a tensor, torch.int64"),
        (2, lambda images: images[:, 0], "test images are torch.uint8 (200, 32, 32)"),
        (3, lambda labels: labels[:, None], "test labels are torch.int64 (200, 1)"),
        (3, lambda labels: labels[:5], "test images are 200 and test labels 5"),
        (1, lambda labels: labels + 1, "Net returns logits (1, 10) for one image"),
        (3, lambda labels: labels + 1, "Net returns logits (1, 10) for one image"),
        (1, lambda labels: labels - 1, "a label is -1"),
    ],
)
def test_wrong_data_ends_in_one_line(main, monkeypatch, place, wrong, line):
    data_set = few_images.make()
    data_set[place] = wrong(data_set[place])
    monkeypatch.setattr(train, "load_data", lambda args: data_set)
    result = main("--device", "cpu")
    assert result.returncode == 1
    assert result.stderr.startswith(f"train.py: error: {line}")
    assert "; allowed: " in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("given", "found"), [(None, "a NoneType"), ((1, 2, 3), "a tuple of 3")])
def test_load_data_must_return_four_tensors(main, monkeypatch, given, found):
    monkeypatch.setattr(train, "load_data", lambda args: given)
    line = f"train.py: error: load_data() returns {found}; allowed: a tuple of training images, "
    assert main().stderr.startswith(line)


def test_a_network_with_too_few_classes_and_a_shift_by_too_many_pixels_end_in_one_line(
    main, monkeypatch
):
    small = [x[:, :, :16, :16] if x.ndim == 4 else x for x in few_images.make()]
    monkeypatch.setattr(train, "load_data", lambda args: small)
    monkeypatch.setattr(train.Net, "forward", lambda self, x: (x, x))
    assert "Net returns a tuple; allowed: a tensor of logits" in main().stderr
    monkeypatch.setattr(train.Net, "forward", lambda self, x: x.flatten(1)[:, :9])
    assert "Net returns logits (1, 9) for one image; allowed: (1, classes), " in main().stderr
    monkeypatch.setattr(train.Net, "forward", lambda self, x: x.flatten(1)[:, :10])
    error = main("--augment", "16").stderr
    assert error == "train.py: error: augment is 16; allowed: < 16, the images' size\n"


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
        [project / SEARCH[0].name, "--no-rehearsal"],  # a rehearsal runs the same code
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
