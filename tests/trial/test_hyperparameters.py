"""Hyperparameters from defaults, --params, flags and tuner: which one counts, wrong values."""

import json

import pytest
from conftest import BASELINE, ROOT

import train
from trial.hyperparameters import Choice, Number

KEYS = ", ".join(BASELINE)
REFUSED = [
    ("batch_size", [0, -4, "many"], "an integer >= 1"),
    ("lr", [0, -0.1, float("inf"), float("nan"), "fast"], "a finite number > 0"),
    ("optimizer", ["RMSprop", "sgd"], "SGD, Adam, AdamW, Muon"),
    ("momentum", [1, -0.1, "high"], "a finite number >= 0 and < 1"),
    ("weight_decay", [-0.1, float("inf"), 10**400], "a finite number >= 0"),
    ("label_smoothing", [1], "a finite number >= 0 and < 1"),
    ("lr_schedule", ["step"], "constant, cosine, one_cycle"),
    ("augment", [-1, 17], "an integer >= 0 and <= 16"),
]
REFUSED_JSON = [
    ("batch_size", [True, None, [4, 8]], "an integer >= 1"),
    ("batch_size", [4.5, 16.0], "an integer >= 1 (randint in a search space)"),  # quniform's
    ("lr", ["0.1"], "a finite number > 0"),
    ("momentum", [False], "a finite number >= 0 and < 1"),
    ("optimizer", [{"_name": "SGD"}, 3], "SGD, Adam, AdamW, Muon"),
    ("batchsize", [4], KEYS),
    ("seed", [4], KEYS),
    ("", [None], KEYS),
]


def hyperparameters(args):
    return {key: getattr(args, key) for key in BASELINE}


def test_the_defaults_are_the_baseline():
    args = train.parse_args([])
    assert hyperparameters(args) == BASELINE
    assert [type(value) for value in hyperparameters(args).values()] == [
        type(value) for value in BASELINE.values()
    ]
    assert (args.report_every, args.seed) == (2000, 0)


def test_every_hyperparameter_is_a_flag():
    flags = "--batch-size 64 --lr 1e-2 --epochs 10 --optimizer AdamW --momentum .5 --augment 2"
    flags += " --weight-decay 1e-4 --label-smoothing 0.1 --lr-schedule cosine"
    expected = {"batch_size": 64, "lr": 0.01, "epochs": 10, "optimizer": "AdamW", "momentum": 0.5}
    expected |= {"weight_decay": 1e-4, "label_smoothing": 0.1}
    expected |= {"lr_schedule": "cosine", "augment": 2}
    assert hyperparameters(train.parse_args(flags.split())) == expected


def test_the_tuner_overrides_flags_and_flags_override_the_file(tmp_path):
    file = tmp_path / "best.json"
    file.write_text(json.dumps({"lr": 0.5, "epochs": 7, "momentum": 0, "batch_size": 8}))
    args = train.parse_args(["--params", str(file), "--lr", "0.25", "--batch-size", "4"])
    expected = BASELINE | {"batch_size": 4, "lr": 0.25, "epochs": 7, "momentum": 0.0}
    assert hyperparameters(args) == expected  # also where a flag gives the default
    assert isinstance(args.momentum, float)  # the file has an integer
    train.set_hyperparameters(args, {"batch_size": 32}, "tuner")
    assert hyperparameters(args) == expected | {"batch_size": 32}


@pytest.mark.parametrize(("key", "values", "allowed"), REFUSED + REFUSED_JSON)
def test_a_wrong_value_from_the_tuner_is_refused(key, values, allowed):
    for value in values:
        with pytest.raises(ValueError) as error:
            train.set_hyperparameters(train.parse_args([]), {key: value}, "tuner")
        message = str(error.value)
        assert message.startswith(f"tuner: {key} is {value!r}; allowed")
        assert message.endswith(allowed)
        assert "\n" not in message


def refusal(argv, capsys):
    """Return the one line of the error for this command line."""
    with pytest.raises(SystemExit) as exit:
        train.parse_args([str(arg) for arg in argv])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("key", "values", "allowed"), [*REFUSED, ("epochs", [4.5], "an integer")])
def test_a_wrong_value_of_a_flag_is_refused(key, values, allowed, capsys):
    for value in values:
        flag = f"--{key.replace('_', '-')}"
        line = refusal([f"{flag}={value}"], capsys)
        assert f"argument {flag}: '{value}' is not allowed; allowed: {allowed}" in line


@pytest.mark.parametrize(("key", "values", "allowed"), REFUSED + REFUSED_JSON)
def test_a_wrong_value_in_the_file_is_refused(key, values, allowed, tmp_path, capsys):
    file = tmp_path / "params.json"
    for value in values:
        file.write_text(json.dumps({key: value}))
        line = refusal(["--params", file], capsys)
        assert f"{file}: {key} is {value!r}; allowed" in line
        assert line.endswith(allowed)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batchsize", "4"], ["unrecognized arguments: --batchsize 4"]),
        (["--batch", "4"], ["unrecognized arguments: --batch 4"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--seed", "-1"], ["--seed: '-1' is not allowed", "allowed: an integer >= 0"]),
        (["--seed", "x"], ["--seed: 'x' is not allowed"]),
        (["--report-every", "0"], ["--report-every: '0' is not allowed", ">= 1"]),
        (["--dataset", "mnist"], ["--dataset", "mnist", "cifar10", "synthetic"]),
        (["--device", "abacus"], ["--device is abacus", "allowed"]),
        (["--device", "meta"], ["--device is meta", "allowed"]),
        (["--save", "/no/such/folder/model.pt"], ["--save is /no/such/folder/model.pt", "allowed"]),
        (["--save", "/dev/null"], ["--save is /dev/null", "allowed: a file in a folder"]),
        (["--save", ROOT], [f"--save is {ROOT}", "allowed: a file in a folder"]),
        (["--params", "/no/such/file.json"], ["/no/such/file.json", "No such file"]),
    ],
)
def test_wrong_flags_are_refused(argv, parts, capsys):
    line = refusal(argv, capsys)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"lr: 1", b"\xff\xfe\x00", b"[1]", b"3", b"null", b"[" * 10**5],
    ids=lambda content: content[:8].decode(errors="replace"),
)
def test_a_file_without_hyperparameters_is_refused(content, tmp_path, capsys):
    file = tmp_path / "params.json"
    file.write_bytes(content)
    assert str(file) in refusal(["--params", file], capsys)


def test_a_new_hyperparameter_may_be_one_of_several_numbers(monkeypatch, capsys):
    monkeypatch.setitem(train.HYPERPARAMETERS, "width", Choice(64, "how wide", [64, 128]))
    assert train.parse_args(["--width", "128"]).width == 128
    line = "argument --width: '100' is not allowed; allowed: 64, 128"
    assert line in refusal(["--width", "100"], capsys)
    monkeypatch.setitem(train.HYPERPARAMETERS, "width", Choice(32, "how wide", [64, 128]))
    assert "--width: '32' is not allowed; allowed: 64, 128" in refusal([], capsys)


def test_a_new_hyperparameter_may_have_an_integer_default_and_any_meaning(monkeypatch, capsys):
    entry = Number(0, "how many of 100 %s are dropped, 50%", at_least=0, below=1)
    monkeypatch.setitem(train.HYPERPARAMETERS, "dropout", entry)
    assert train.parse_args(["--dropout", "0.3"]).dropout == 0.3
    assert type(train.parse_args([]).dropout) is float
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = "how many of 100 %s are dropped, 50% (a finite number >= 0 and < 1; default: 0)"
    assert text in " ".join(capsys.readouterr().out.split())
