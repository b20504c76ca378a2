"""config.py, checks.py and gpus.py refuse in one line the mistakes that NNI ignores."""

import datetime
import grp
import json
import os
import pwd
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SPACE, nobody
from stand_ins import stand_in_nvidia_smi

import search
from nnisearch.before import checks, config, gpus
from nnisearch.shared.text import one_line

MINE = {"className": "mine.Tuner", "codeDirectory": "."}
DEMO = yaml.safe_load((ROOT / "configs" / "demo.yml").read_text())


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A HOME of the test's own, and this Python first for the trials."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")


@pytest.fixture
def told(tmp_path):
    """Load configs/demo.yml with changes; a change to None leaves the key out."""

    def told(**changes):
        given = DEMO | {"trialCodeDirectory": str(ROOT), "searchSpace": SPACE} | changes
        given = {key: value for key, value in given.items() if value is not None}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(given))
        return config.load(path)

    return told


@pytest.fixture
def load(told):
    """The same without the lines for the user."""
    return lambda **changes: told(**changes)[0]


def refusal(load, **changes):
    """Return the line with which a configuration is refused."""
    with pytest.raises(ValueError) as error:
        loaded = load(**changes)
        checks.check(loaded)
        search.check(loaded)
    assert "\n" not in str(error.value)
    return str(error.value)


LOCAL = {"platform": "local", "useActiveGpu": False}
# A message does not show the password.
MACHINE = {"host": "there", "user": "me", "password": "secret"}
REMOTE = {"platform": "remote", "machineList": [MACHINE]}


def entry(kind, *values):
    return {"lr": {"_type": kind, "_value": list(values)}}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"trialConcurrency": 0}, "trialConcurrency is 0; allowed: an integer > 0"),
        ({"trialConcurrency": "two"}, "trialConcurrency is 'two'; allowed: an integer"),
        ({"trialConcurrency": None}, "trialConcurrency is not set"),
        ({"trialCommand": None}, "trialCommand is None; allowed: a text"),
        ({"maxTrialDuration": "5x"}, "maxTrialDuration is '5x'; allowed: more than 0 seconds"),
        ({"maxExperimentDuration": "0s"}, "maxExperimentDuration is '0s'; allowed: "),
        ({"maxTrialDuration": 1.5}, "maxTrialDuration is 1.5; allowed: more than 0 seconds"),
        ({"logLevel": "trace"}, "logLevel is 'trace'; allowed: error, warning, info, debug"),
        ({"tunerGpuIndices": "a"}, "tunerGpuIndices is 'a': invalid literal"),
        ({"trainingService": LOCAL | {"gpuIndices": [0, 0]}}, "gpuIndices is [0, 0]: Duplication"),
        ({"trainingService": REMOTE | {"machineList": MACHINE}}, "}; allowed: a list of objects"),
        ({"tuner": {"name": "TPE", "classArgs": [1]}}, "classArgs is [1]; allowed: "),
        ({"tuner": MINE | {"codeDirectory": 3}}, "codeDirectory is 3; allowed: a path"),
        ({"experimentType": "nas"}, "experimentType is 'nas'; allowed: hpo"),
        ({"tuner": None}, "tuner must be set"),
        ({"tuner": "TPE"}, "tuner is TPE; allowed: an object with a name"),
        ({"tuner": {"className": "a.B"}}, "; allowed: an object with a name, or with cl"),
        ({"searchSpaceFile": "no.json", "searchSpace": None}, "no.json: No such file"),
        ({"trialCodeDirectory": "/no/such/folder"}, "/no/such/folder"),
        ({"trialGpuNumber": 1}, "trainingService: please set useActiveGpu to True if your syst"),
        ({"useAnnotation": True}, "useAnnotation is true; allowed: false, with nni.get_next_"),
        # Where trials run.
        ({"trainingService": None}, "platform in trainingService is None; allowed: local or rem"),
        ({"trainingService": "local"}, "platform in trainingService is None; allowed: "),
        ({"trainingService": {"platform": "locl"}}, "trainingService is locl; allowed: local or "),
        ({"trainingService": {"platform": "kubeflow"}}, "; `nnictl create` starts it, without"),
        ({"trainingService": [REMOTE, REMOTE]}, "None; allowed: local or remote, in one object"),
        # Keys: misspelled, like no other, of another place, of version 1.
        ({"trialConcurency": 2}, "is no key of the configuration; allowed: trialConcurrency"),
        ({"tuner": {"name": "TPE", "class_arg": {}}}, "classarg is no key of tuner or assessor"),
        ({"tuner": {"name": "TPE", "xyz": 1}}, "; allowed: name, className, codeDirectory, classA"),
        ({"extra": 3}, "extra is no key of the configuration; allowed: experimentName, "),
        (
            {"trainingService": REMOTE | {"machineList": [{"hots": 1}]}},
            "machineList; allowed: ho",
        ),
        ({"gpuIndices": [0]}, "; allowed: gpuIndices in trainingService or machineList"),
        ({"maxTrialNum": 3}, "; allowed: maxTrialNumber"),
        ({"maxTrialNumPerGpu": 3}, "; allowed: maxTrialNumberPerGpu in trainingService or mach"),
        ({"trainingService": LOCAL | {"maxTrialNumPerGpu": 3}}, "; allowed: maxTrialNumberPerGpu"),
    ],
)
def test_a_refusal_names_key_value_and_allowed_values(load, changes, part):
    line = refusal(load, **changes)
    assert part in line
    assert "config.yml: " in line
    assert "secret" not in line
    assert "Config" not in line  # the names of NNI's classes


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\xff", "a: b: c", "yes: 1", "a: 1\na: 1"])
def test_files_without_a_configuration_are_refused(tmp_path, content):
    path = tmp_path / "broken.yml"
    path.write_bytes(content.encode("latin1"))
    os.mkfifo(tmp_path / "pipe")
    for broken in (path, tmp_path / "missing.yml", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"^{broken}: .+$"):
            config.load(broken)


@pytest.fixture
def old(tmp_path):
    """Load a configuration of version 1."""

    def old(trial=None, **changes):
        trial = {"command": "true", "codeDir": "."} | (trial or {})
        content = {"trainingServicePlatform": "local", "trial": trial, "trialConcurrency": 1}
        content |= {"searchSpacePath": "space.json", "tuner": {"builtinTunerName": "Random"}}
        (tmp_path / "space.json").write_text(json.dumps(SPACE))
        (tmp_path / "old.yml").write_text(yaml.safe_dump(content | changes))
        return config.load(tmp_path / "old.yml")[0]

    return old


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"trainingServicePlatform": "adl"}, "trainingServicePlatform is adl; allowed: local or r"),
        ({"trainingServicePlatform": "remote"}, "'machineList' is missing"),
        ({"localConfig": None}, "localConfig is None; allowed: an object"),
        ({"trial": {"gpuNum": -1}}, "gpuNum is -1; allowed: an integer >= 0"),
        ({"trial": {"gpuNum": 1}}, "localConfig: please set useActiveGpu to True if your system"),
        ({"maxTrialNum": 0}, "maxTrialNum is 0; allowed: an integer > 0"),
        ({"multiPhase": True}, "Multi-phase is no longer supported"),
        # NNI drops these.
        ({"maxTrialNumber": 3}, "maxTrialNumber is 3; allowed: maxTrialNum; NNI ignores it"),
        ({"trial": {"gpuNumber": 1}}, "gpuNumber is 1; allowed: to leave it out; NNI"),
        (
            {"tuner": {"builtinTunerName": "TPE", "optimize_mode": "maximize"}},
            "optimize_mode in tuner is maximize; allowed: to leave it out, or classArgs",
        ),
    ],
)
def test_a_refusal_of_a_version_1_names_its_keys(old, tmp_path, changes, part):
    with pytest.raises(ValueError) as error:
        old(**changes)
    assert str(error.value).startswith(f"{tmp_path / 'old.yml'}: ")
    assert part in str(error.value)


def test_version_1_is_converted_and_checked_in_its_own_words(old, monkeypatch):
    loaded = old(maxTrialNum=3, authorName="me", maxExecDuration="1h")
    assert (loaded.max_trial_number, loaded.max_experiment_duration) == (3, "1h")
    assert checks.check(loaded) == []
    monkeypatch.setattr(gpus, "gpus", list)
    with pytest.raises(ValueError, match=r"^gpuNum is 1; allowed: 0, for a search without"):
        checks.check(old(trial={"gpuNum": 1}, localConfig={"useActiveGpu": True}))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"lr":\n  {"_type": "choice"\n   "_value": [1]}}', "line 3, column 4"),
        (
            '{"lr": {"_type": "choice", "_value": [1]},\n "lr": 3}',
            "lr is there 2 times; allowed: ",
        ),
    ],
)
def test_a_mistake_in_a_search_space_file_is_named(load, tmp_path, text, part):
    (tmp_path / "space.json").write_text(text)
    line = refusal(load, searchSpaceFile="space.json", searchSpace=None)
    assert f"searchSpaceFile is {tmp_path}/space.json: " in line
    assert part in line
    assert "<" not in line.replace("<scalar>", "")


def test_a_json_file_that_only_yaml_can_read_is_told(told, tmp_path):
    """NNI runs it, but a missing comma makes one text of two numbers."""
    (tmp_path / "space.json").write_text('{"lr": {"_type": "choice",\n "_value": [16 32]}}')
    loaded, (line,) = told(searchSpaceFile="space.json", searchSpace=None)
    assert loaded.search_space["lr"]["_value"] == ["16 32"]
    assert "space.json, which NNI reads as YAML: Expecting ',' delimiter: line 2" in line


def test_other_forms_of_values_are_accepted_as_in_nni(told):
    forms = {"maxTrialDuration": 600, "maxExperimentDuration": "1.5h", "tunerGpuIndices": 1}
    service = {"platform": "local", "gpuIndices": "0, 2", "reuseMode": True}
    loaded, (line,) = told(**forms, trainingService=service)
    assert line.startswith("reuseMode is true; ")
    assert not loaded.training_service.reuse_mode
    assert checks.check(loaded) == []
    assert loaded.tuner_gpu_indices == [1]
    assert loaded.training_service.gpu_indices == [0, 2]


def test_nnis_keys_in_the_training_service_come_first(load, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    inside = {"trialCommand": "true", "trialCodeDirectory": ".", "trialGpuNumber": 1}
    loaded = load(trialCommand=None, trialGpuNumber=0, trainingService=LOCAL | inside)
    assert (loaded.trial_command, loaded.trial_gpu_number) == ("true", 1)
    assert loaded.trial_code_directory == str(tmp_path)
    assert loaded.training_service.gpu_indices == [1]
    assert checks.check(load(trialGpuNumber=1, trainingService=LOCAL | {"trialGpuNumber": 0})) == []


NESTED = {"_name": "a", "b": {"_type": "uniform", "_value": [3, 1]}}


@pytest.mark.parametrize(
    ("space", "part"),
    [
        ([1], "searchSpace is [1]; allowed: an object"),
        ({"lr": 3}, "lr is 3; allowed: an object of _type and _value"),
        (entry("log", 1, 2), "lr: _type is log; allowed: choice, uniform"),
        (entry("choice"), "lr is []; allowed: a list of at least one value"),
        (entry("choice", 1, float("nan")), "lr is [1, nan]; allowed: finite numbers"),
        (entry("uniform", 2, 1), "lr is [2, 1]; allowed for uniform: the lower bound first"),
        (entry("uniform", 1), "lr is [1]; allowed for uniform: a list of 2 numbers"),
        (entry("uniform", 1, "two"), "lr is [1, 'two']; allowed for uniform: numbers"),
        (entry("uniform", 1, None), "lr is [1, None]; allowed for uniform: numbers"),
        (entry("uniform", 0.1, float("nan")), "lr is [0.1, nan]; allowed for uniform: finite"),
        (entry("loguniform", 0, 1), "lr is [0, 1]; allowed for loguniform: a lower bound above 0"),
        (entry("quniform", 1, 2, 0), "lr is [1, 2, 0]; allowed for quniform: a step that is not"),
        (entry("choice", NESTED), "searchSpace: lr: a: b is [3, 1]; allowed for uniform: the low"),
        # What train.py refuses
        (SPACE | {"layers": {"_type": "choice", "_value": [1]}}, "layers is 1; allowed keys: "),
        (SPACE | entry("choice", 0.1, 0), "lr is 0; allowed: a finite number > 0"),
        (SPACE | entry("uniform", -1, 1), "lr is -1.0; allowed: a finite number > 0"),
        ({"epochs": {"_type": "quniform", "_value": [1, 4, 1]}}, ".0; allowed: an integer"),
        ({"augment": {"_type": "randint", "_value": [0, 18]}}, "augment is 17; allowed"),
    ],
)
def test_wrong_search_spaces_are_refused(load, space, part):
    assert part in refusal(load, searchSpace=space)


def test_right_search_spaces_are_accepted(load):
    loaded = load(searchSpace=SPACE | {"augment": {"_type": "randint", "_value": [0, 17]}})
    assert checks.check(loaded) == []
    search.check(loaded)
    others = entry("choice", None, [1], {"a": 1}) | {"x": {"_type": "uniform", "_value": [1, 1]}}
    assert checks.check(load(searchSpace=others)) == []


@pytest.mark.parametrize("space", [{}, [1, "two"], {"lr": {"_type": "mine", "_value": 3}}])
def test_a_users_own_tuner_may_have_any_search_space(load, space):
    checks.check(load(searchSpace=space, tuner=MINE))


def test_what_nni_ignores_or_misreads_in_a_search_space_is_warned_of(load):
    nested = {"_name": "a", "b": {"_type": "choice", "_value": ["5E-2", "text", "1.0e-4"]}}
    space = entry("loguniform", "1e-4", 0.1) | {"x": {"_type": "choice", "_value": [nested]}}
    space["y"] = {"_type": "uniform", "_value": [0, 1, None], "_default": 0.5}
    assert checks.check(load(searchSpace=space, tuner={"name": "TPE"})) == [
        "searchSpace: lr: YAML reads 1e-4 as text; for a number write 1.0e-4",
        "searchSpace: x: a: b: YAML reads 5E-2 as text; for a number write 5.0e-2",
        "searchSpace: y: NNI ignores _default",
        "searchSpace: y is [0, 1, None]; NNI uses the first 2 for uniform",
    ]


def test_nested_choices_are_warned_of(load):
    inner = {"_type": "choice", "_value": [{"_name": "c"}, {"_name": "d"}]}
    space = entry("choice", {"_name": "a"}, {"_name": "b", "inner": inner})
    line = "searchSpace: lr: b: inner is nested in an option: NNI's tuner fails if it"
    for name in ("TPE", "Random"):
        (warning,) = checks.check(load(searchSpace=space, tuner={"name": name}))
        assert warning.startswith(line)
    assert checks.check(load(searchSpace=space, tuner={"name": "Evolution"})) == []
    shallow = entry("choice", {"_name": "a"}, {"_name": "b"} | entry("choice", 1, 2))
    assert checks.check(load(searchSpace=shallow, tuner={"name": "TPE"})) == []


def test_a_date_is_refused_because_json_has_none(load):
    space = {"x": {"_type": "choice", "_value": [datetime.date(2020, 1, 1)]}}
    line = refusal(load, searchSpace=space)
    assert "searchSpace: x: _value: 0 is 2020-01-01; allowed: a text, a number, " in line


@pytest.mark.parametrize("key", ["__symbol__", "__nni_type__", "__nni_obj__", "__enum__"])
@pytest.mark.parametrize("tuner", [{"name": "TPE"}, MINE])
def test_code_in_a_search_space_is_refused(load, key, tuner):
    option = {"_name": "a", "b": [[{key: 1}]]}
    for changes in (
        {"searchSpace": {key: "path:os.system"}},
        {"searchSpace": {"x": {"_type": "choice", "_value": [1, option]}}},
        {"searchSpace": {"x": {"_type": "uniform", "_value": [0, 1], key: "path:os.system"}}},
        {"tuner": tuner | {"classArgs": {"a": {key: 1}}}},
    ):
        line = refusal(load, **{"tuner": tuner} | changes)
        assert f"{key} is " in line
        assert "no key that runs code" in line


OPTUNAS = (
    f"; allowed: className: nnisearch.tuners.OptunaTuner, codeDirectory: {ROOT} and classArgs: "
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tuner": {"name": "TPEE"}}, ["tuner.name is 'TPEE'; allowed: ", "TPE", "BatchTuner"]),
        ({"assessor": {"name": "Median"}}, ["assessor.name is 'Median'; allowed: ", "Medianstop"]),
        ({"tuner": {"name": "hyperband"}}, ["tuner is hyperband", OPTUNAS, "first result"]),
        ({"tuner": None, "advisor": {"name": "BOHB"}}, ["tuner is BOHB", OPTUNAS]),
        ({"tuner": {"name": "GP"}}, [OPTUNAS, "GPSampler}; NNI's needs scipy<1.11"]),
        ({"tuner": {"name": "MetisTuner"}}, [OPTUNAS, "GPSampler}; NNI's needs scipy<1.11"]),
        ({"tuner": {"name": "NetworkMorphism"}}, [OPTUNAS, "needs numpy<1.24"]),
        ({"tuner": {"name": "Anneal"}}, [OPTUNAS, "TPESampler}; NNI's needs hyperopt"]),
        ({"tuner": {"name": "DNGO"}}, [OPTUNAS, "needs pybnn"]),
        ({"tuner": MINE | {"className": "nni.algorithms.hpo.gp_tuner.GPTuner"}}, [OPTUNAS]),
        ({"assessor": {"name": "Curvefitting"}}, ["; allowed: Medianstop; ", "needs numpy<1.24"]),
    ],
)
def test_unusable_algorithms_are_refused(load, monkeypatch, changes, parts):
    installed = {"scipy": "1.11.0", "numpy": "1.24.0"}
    monkeypatch.setattr(checks, "version", lambda name: installed.get(name) or version(name))
    line = refusal(load, **changes)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("name", ["GP", "Metis", "NetworkMorphism", "TPE_legacy", "SMAC", "PPO"])
def test_algorithms_of_older_packages_are_accepted(load, monkeypatch, name):
    monkeypatch.setattr(checks, "version", lambda _: "1.10.2")
    assert checks.check(load(tuner={"name": name})) == []


@pytest.mark.parametrize(
    ("number", "service", "part"),
    [
        (3, LOCAL, "trialGpuNumber is 3; allowed: at most 2, "),
        (1, LOCAL | {"gpuIndices": [0, 2]}, "gpuIndices is 2; allowed: below 2"),
        (2, LOCAL | {"gpuIndices": [1]}, "trialGpuNumber is 2; allowed: at most 1, "),
    ],
)
def test_missing_gpus_are_refused(load, tmp_path, monkeypatch, number, service, part):
    stand_in_nvidia_smi(tmp_path / "home", busy=[False, True])
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    assert part in refusal(load, trialGpuNumber=number, trainingService=service)


def test_without_gpus_the_refusal_names_trial_gpu_number_0(load, monkeypatch):
    monkeypatch.setattr(gpus, "gpus", list)
    line = refusal(load, trialGpuNumber=1, trainingService=LOCAL | {"gpuIndices": [0]})
    assert line.startswith("trialGpuNumber is 1; allowed: 0, for a search without GPUs")


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("echo Driver mismatch >&2; exit 18", "it says: Driver mismatch"),
        ("echo '<nvidia_smi_log><gpu>'", "it says: <nvidia_smi_log><gpu>"),
    ],
)
def test_a_failure_of_nvidia_smi_is_refused(load, tmp_path, monkeypatch, script, part):
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    stand_in_nvidia_smi(tmp_path / "home", busy=[])
    (tmp_path / "home" / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    line = refusal(load, trialGpuNumber=1, trainingService=LOCAL)
    assert line.startswith("nvidia-smi fails: ")
    assert part in line
    assert part in gpus.waiting_for(load(trainingService=LOCAL).training_service)
    path, why = search.default_config()
    assert path.name == "cpu.yml"
    assert part in why


def test_nvidia_smi_may_hang_or_find_nothing_or_warn(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, False])
    script = tmp_path / "home" / "nvidia-smi"
    script.write_text(script.read_text() + "echo WARNING: infoROM is corrupted at gpu 0\n")
    assert [len(held) for held in gpus.gpus()] == [1, 0]
    script.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    assert gpus.gpus() == []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, timeout, **k: run(*a, timeout=0.2, **k))
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(ValueError, match=r"nvidia-smi fails: .* timed out"):
        gpus.gpus()


@pytest.mark.parametrize(
    ("visible", "given", "expected", "part"),
    [
        ("1", None, [1], "may use GPU 1, as CUDA_VISIBLE_DEVICES says"),
        ("3, 1", None, [3, 1], "may use GPU 3, 1, as "),
        ("1", [0], [0], None),
        (None, None, None, None),
        ("GPU-8932f937", None, None, "CUDA_VISIBLE_DEVICES is 'GPU-8932f937' and has no effect: "),
        ("MIG-GPU-8932f937/1/0", None, None, "; allowed: numbers, gpuIndices, or no trialGpuNum"),
        ("0,GPU-1", None, None, "CUDA_VISIBLE_DEVICES is '0,GPU-1' and "),
        ("", None, None, "CUDA_VISIBLE_DEVICES is '' and "),
        ("-1", None, None, "CUDA_VISIBLE_DEVICES is '-1' and "),
    ],
)
def test_cuda_visible_devices_replaces_gpu_indices(
    told, monkeypatch, visible, given, expected, part
):
    """NNI ignores it; what has no numbers is told, and runs as with NNI."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    service = LOCAL | {"gpuIndices": given}
    loaded, lines = told(trialGpuNumber=1, trainingService=service)
    assert loaded.training_service.gpu_indices == expected
    assert len(lines) == (part is not None)
    assert not part or part in lines[0]
    assert told(trialGpuNumber=0)[1] == []


def test_the_processes_on_busy_gpus_are_named(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "home"), prepend=":")
    service = load(trialGpuNumber=1, trainingService=LOCAL).training_service
    stand_in_nvidia_smi(tmp_path / "home", busy=[True, False])
    assert gpus.waiting_for(service) is None
    service.gpu_indices = [0]
    assert gpus.waiting_for(service).startswith("GPU 0: ")
    service.use_active_gpu = True
    assert gpus.waiting_for(service) is None


def test_a_read_only_home_is_refused(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    with pytest.raises(ValueError) as error:
        checks.check_disk(folder, 1)
    assert str(error.value).startswith(
        f"experimentWorkingDirectory is '{folder}'; allowed: a folder"
    )


def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    user = pwd.getpwuid(os.getuid()).pw_name
    own, shared = (grp.struct_group((user, "x", 7, who)) for who in ([user], [user, "another"]))
    monkeypatch.setattr(grp, "getgrgid", lambda _: own)
    for mode in (0o755, 0o775, 0o1777):
        tmp_path.chmod(mode)
        checks.check_private(tmp_path / "missing")
        checks.check_private(tmp_path)
    tmp_path.chmod(0o777)
    checks.check_private(tmp_path / "home" / "nni-experiments")  # HOME is the user's to guard
    monkeypatch.setenv("HOME", "/")
    (tmp_path / "own").mkdir(mode=0o700)
    for folder in (tmp_path, tmp_path / "own", tmp_path / "missing"):  # others can move it away
        with pytest.raises(ValueError) as error:
            checks.check_private(folder)
        assert str(error.value) == (
            f"experimentWorkingDirectory is '{folder}'; allowed: a folder that, like its parents,"
            " is yours or root's and only you can write to; "
            f"others can write to '{tmp_path}': chmod go-w '{tmp_path}'"
        )
    monkeypatch.setattr(grp, "getgrgid", lambda _: shared)
    tmp_path.chmod(0o775)
    with pytest.raises(ValueError, match="others can write to "):
        checks.check_private(tmp_path)


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_folder_below_another_users_is_refused(tmp_path, mode):
    """Its owner can rename what is in it, also if it is sticky."""
    there = tmp_path / "theirs"
    (there / "mine").mkdir(parents=True)
    os.chown(there, nobody(), -1)
    there.chmod(mode)
    for folder in (there, there / "mine", there / "missing"):
        with pytest.raises(ValueError, match=f"'{there}' belongs to user {nobody()}$"):
            checks.check_private(folder)


def test_a_localhost_that_is_no_loopback_is_refused(load, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("192.0.2.7", 0))])
    assert refusal(load).startswith("localhost is 192.0.2.7; allowed: 127.0.0.1 or ::1")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password is 123456; allowed: a text", "password is ***; allowed: a text"),
        ("'WANDB_API_KEY=abc run --hf-token xyz'", "'WANDB_API_KEY=*** run --hf-token ***'"),
        ("{'storageAccountKey': 'a b', 'n': 3}", "{'storageAccountKey': ***, 'n': 3}"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("password is not set; KeyError: 5", "password is not set; KeyError: 5"),
    ],
)
def test_no_message_shows_a_password(text, shown):
    assert one_line(text) == shown


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "c.yml").write_text(yaml.safe_dump(DEMO | {"trialConcurrency": 0}))
    command = [sys.executable, ROOT / "search.py", tmp_path / "c.yml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"search.py: error: {tmp_path}/c.yml: trialConcurrency is 0; allowed")
    assert [path.name for path in (tmp_path / "home").iterdir()] in ([], ["nni-experiments"])
