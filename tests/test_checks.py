"""checks.py: each mistake that NNI would take in silence, refused in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SPACE
from test_experiment import stand_in_nvidia_smi

from nnisearch import checks

DEMO = yaml.safe_load((ROOT / "configs" / "demo.yml").read_text())


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A HOME of the test's own, and this Python first for the trials."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")


@pytest.fixture
def load(tmp_path):
    """Load configs/demo.yml with changes; a change to None leaves the key out."""

    def load(**changes):
        config = DEMO | {"trialCodeDirectory": str(ROOT), "searchSpace": SPACE} | changes
        config = {key: value for key, value in config.items() if value is not None}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(config))
        return checks.load(path)

    return load


def refusal(load, **changes):
    """Return the line with which a configuration is refused."""
    with pytest.raises(ValueError) as error:
        checks.check(load(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def entry(kind, *values):
    return {"lr": {"_type": kind, "_value": list(values)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu.yml", "demo.yml", "wide.yml"])
def test_the_projects_configurations_pass(name):
    checks.check(checks.load(ROOT / "configs" / name))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"trialConcurrency": 0}, ["trial_concurrency is 0; allowed: trial_concurrency > 0"]),
        ({"trialConcurrency": "two"}, ["trial_concurrency ('two')", "int"]),
        ({"trialConcurrency": None}, ["trial_concurrency is not set"]),
        ({"trialConcurency": 2}, ["does not have field(s) trialconcurency"]),
        ({"maxTrialDuration": "5x"}, ['"5x"', "d, h, m, s"]),
        ({"tuner": None}, ["tuner must be set"]),
        ({"trainingService": {"platform": "locl"}}, ["platform is 'locl'; allowed: local, remote"]),
        ({"searchSpaceFile": "no.json", "searchSpace": None}, ["no.json"]),
        ({"trialCodeDirectory": "/no/such/folder"}, ["/no/such/folder"]),
    ],
)
def test_configurations_that_nni_refuses(load, changes, parts):
    line = refusal(load, **changes)
    assert all(part in line for part in parts), line
    assert "config.yml: " in line


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\xff", "a: b: c"])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "broken.yml"
    path.write_bytes(content.encode("latin1"))
    for broken in (path, tmp_path / "missing.yml"):
        with pytest.raises(ValueError, match=f"^{broken}: .+$"):
            checks.load(broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ([1], ["searchSpace is [1]", "an object"]),
        ({}, ["searchSpace is {}", "an object"]),
        ({"lr": 3}, ["lr", "3"]),
        (entry("log", 1, 2), ['"lr"', '"log"']),
        (entry("choice"), ["lr is []; allowed: at least one value"]),
        (entry("uniform", 2, 1), ['"lr"', "high > low", "[2, 1]"]),
        (entry("uniform", 1), ['"lr"', "must have 2 values"]),
        (entry("uniform", 0.1, float("nan")), ["lr is [0.1, nan]; allowed: finite numbers"]),
        (entry("loguniform", 0, 1), ['"lr"', "low > 0"]),
        (entry("quniform", 1, 2, 0), ["lr is [1, 2, 0]; allowed: a step above 0"]),
        (entry("choice", {"_name": "a", "b": {"_type": "uniform", "_value": [3, 1]}}), ['"b"']),
        (SPACE | {"layers": {"_type": "choice", "_value": [1]}}, ["layers is 1; allowed keys: "]),
        (SPACE | entry("choice", 0.1, 0), ["lr is 0; allowed: a finite number > 0"]),
        (SPACE | entry("uniform", -1, 1), ["lr is -1; allowed: a finite number > 0"]),
        (
            SPACE | {"epochs": {"_type": "quniform", "_value": [1, 4, 1]}},
            [".0; allowed: an integer"],
        ),
        (SPACE | {"augment": {"_type": "randint", "_value": [0, 18]}}, ["augment is 17; allowed"]),
    ],
)
def test_search_spaces(load, space, parts):
    line = refusal(load, searchSpace=space)
    assert all(part in line for part in parts), line


@pytest.mark.slow
def test_search_spaces_that_are_good(load):
    space = SPACE | {"augment": {"_type": "randint", "_value": [0, 17]}}
    checks.check(load(searchSpace=space))
    checks.check(load(searchSpace=entry("choice", None, 1, 2) | SPACE, trialCommand="true"))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"a": {"_type": "choice", "_value": [1, 2, 3]}}, 3),
        (
            {
                "a": {"_type": "choice", "_value": [1, 2]},
                "b": {"_type": "randint", "_value": [0, 5]},
            },
            10,
        ),
        ({"a": {"_type": "quniform", "_value": [0, 1, 0.25]}}, 5),
        (
            {
                "a": {
                    "_type": "choice",
                    "_value": [
                        {"_name": "one"},
                        {"_name": "two", "b": {"_type": "choice", "_value": [1, 2, 3]}},
                    ],
                }
            },
            4,
        ),
        (SPACE, float("inf")),
    ],
)
def test_combinations(space, expected):
    assert checks.combinations(space) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"searchSpace": {"batch_size": {"_type": "choice", "_value": [32, 64]}}},
            ["maxTrialNumber is 9; allowed: at most 2"],
        ),
        ({"tuner": {"name": "TPEE"}}, ["tuner.name is 'TPEE'; allowed: ", "TPE"]),
        ({"tuner": {"name": "TPE", "classArgs": {"foo": 1}}}, ["TPE with {'foo': 1}", "foo"]),
        ({"assessor": {"name": "Median"}}, ["assessor.name is 'Median'; allowed: ", "Medianstop"]),
        ({"trialCommand": "python3 train.py --foo 1"}, ["--foo 1", "unknown"]),
        ({"trialCommand": "python3 train.py --seed x"}, ["--seed", "'x'"]),
        ({"trialCommand": "python3 trian.py"}, ["'python3 trian.py', which fails: ", "trian.py"]),
        ({"trialCommand": "python3 -c 'import nopackage'"}, ["ModuleNotFoundError", "nopackage"]),
        ({"trialCommand": "pyton train.py"}, ["pyton", "command not found"]),
    ],
)
def test_tuners_and_trial_commands(load, changes, parts):
    line = refusal(load, **changes)
    assert all(part in line for part in parts), line


@pytest.mark.slow
def test_advisors_and_assessors_pass(load):
    medianstop = {"name": "Medianstop", "classArgs": {"optimize_mode": "minimize"}}
    checks.check(load(trialCommand="true", assessor=medianstop))
    checks.check(load(trialCommand="true", tuner={"name": "Hyperband", "classArgs": {"R": 9}}))


LOCAL = {"platform": "local", "useActiveGpu": False}


@pytest.mark.parametrize(
    ("number", "service", "part"),
    [
        (3, LOCAL, "trialGpuNumber is 3; allowed: at most 2, "),
        (1, LOCAL | {"gpuIndices": [0, 2]}, "gpuIndices is 2; allowed: below 2"),
        (2, LOCAL | {"gpuIndices": [1]}, "trialGpuNumber is 2; allowed: at most 1, "),
    ],
)
def test_gpus_that_do_not_exist(load, tmp_path, monkeypatch, number, service, part):
    stand_in_nvidia_smi(tmp_path / "home", busy=[False, True])
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    assert part in refusal(load, trialGpuNumber=number, trainingService=service)


def test_without_gpus_the_refusal_names_the_configuration_that_needs_none(load, monkeypatch):
    monkeypatch.setattr(checks, "gpus", list)
    line = refusal(load, trialGpuNumber=1, trainingService=LOCAL)
    assert line.startswith("trialGpuNumber is 1; allowed: at most 0, ")
    assert "configs/cpu.yml" in line


def test_who_holds_the_gpus(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    service = load(trialGpuNumber=1, trainingService=LOCAL).training_service
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, False])
    assert checks.waiting_for(service) is None
    service.gpu_indices = [0]
    assert checks.waiting_for(service).startswith("GPU 0: ")
    service.use_active_gpu = True
    assert checks.waiting_for(service) is None


def test_a_trial_is_tried_on_a_free_gpu_only(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    config = load(
        trialGpuNumber=1,
        trainingService=LOCAL,
        trialCommand=f"printenv CUDA_VISIBLE_DEVICES > {tmp_path}/seen",
    )
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, False])
    checks.try_trial(config)
    assert (tmp_path / "seen").read_text() == "1\n"
    (tmp_path / "seen").unlink()
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, True])
    checks.try_trial(config)
    assert not (tmp_path / "seen").exists()


def test_paths_with_spaces(load, tmp_path):
    folder = tmp_path / "my project"
    folder.mkdir()
    line = refusal(load, trialCodeDirectory=str(folder))
    assert line == f"trialCodeDirectory is '{folder}'; allowed: a path without spaces"
    line = refusal(load, experimentWorkingDirectory=str(folder))
    assert line == f"experimentWorkingDirectory is '{folder}'; allowed: a path without spaces"


def test_a_machine_without_ps(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "home"))
    line = refusal(load)
    assert line == "PATH has no ps, by which NNI ends trials; Debian: apt install procps"


def test_a_home_that_cannot_be_written(load, tmp_path):
    (tmp_path / "file").touch()
    line = refusal(load, experimentWorkingDirectory=str(tmp_path / "file" / "below"))
    assert line.startswith(
        f"experimentWorkingDirectory is '{tmp_path}/file/below'; allowed: a folder"
    )


def test_nothing_is_left_of_the_trial_that_was_tried(load, tmp_path):
    import psutil

    command = (
        f"sleep 987 & echo $! > {tmp_path}/pid; python3 -c 'import nni; nni.get_next_parameter()'"
    )
    checks.try_trial(load(trialCommand=command))
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "nothing on stderr: was it killed?"),
        ("one\ntwo\n", "two"),
        ("Traceback\n  File x\nValueError: no\n", "ValueError: no"),
        (
            "train.py: error: lr is 0\nE1 torch failed\nerrors.ChildFailedError:\n====\n",
            "train.py: error: lr is 0",
        ),
    ],
)
def test_the_reason_in_a_stderr(text, expected):
    assert checks.reason(text) == expected


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "c.yml").write_text(yaml.safe_dump(DEMO | {"trialConcurrency": 0}))
    command = [sys.executable, ROOT / "search.py", tmp_path / "c.yml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"search.py: error: {tmp_path}/c.yml: trial_concurrency is 0; allowed")
    assert [path.name for path in (tmp_path / "home").iterdir()] in ([], ["nni-experiments"])
