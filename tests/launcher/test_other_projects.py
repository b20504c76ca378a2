"""nnisearch with other projects' configurations, from their folders: what nnictl runs, it runs."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import yaml
from conftest import ROOT, as_process
from experiment import free_port, kill_at
from projects import CONFIG, SUPPORT, TRIAL
from stand_ins import stand_in_nvidia_smi

from nnisearch import cli
from nnisearch.before import config, rehearsal
from nnisearch.start.launch import Watchdog

OWN = {"codeDirectory": "."}  # of a user's own tuner or assessor


class Project:
    """A folder with a trial and a configuration, in which nnisearch is run as a user would."""

    def __init__(self, folder, environment):
        self.folder, self.home = folder / "project", folder / "home"
        self.folder.mkdir()
        self.home.mkdir()
        self.environment = environment | {
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.home}:{Path(sys.executable).parent}:{environment['PATH']}",
        }
        self.write("trial.py", TRIAL)
        for name in ("own", "checks", "config", "progress", "text"):  # all but own as in nnisearch
            shutil.copy(SUPPORT / "own.py", self.folder / f"{name}.py")

    def write(self, name, text):
        (self.folder / name).write_text(textwrap.dedent(text))

    def configure(self, **changes):
        content = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        self.write("config.yml", yaml.safe_dump(content, allow_unicode=True))

    def trials(self):
        """Return (status, parameters) of each trial of the one experiment, in their order."""
        (database,) = self.home.glob("*/[!_]*/db/nni.sqlite")
        with contextlib.closing(sqlite3.connect(database)) as rows:
            columns = "trialJobId, event, data"
            events = rows.execute(f"SELECT {columns} FROM TrialJobEvent ORDER BY rowid").fetchall()
        given = {id: json.loads(data)["parameters"] for id, event, data in events if data}
        last = {id: event for id, event, _ in events}
        return [(last[id], given[id]) for id in given]

    def succeeds(self, trials=2, **changes):
        """Run nnisearch to its end; return the output and the sets of its successful trials."""
        if changes:
            self.configure(**changes)
        command = [sys.executable, "-c", "import sys; from nnisearch import cli; "]
        command[-1] += "sys.path.pop(0); sys.exit(cli.main())"
        result = subprocess.run(
            [*command, "config.yml", "-p", str(free_port())],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        found = self.trials()
        assert [status for status, _ in found] == ["SUCCEEDED"] * trials, result.stdout
        assert "Traceback" not in result.stderr
        return result.stdout, [given for _, given in found]


@pytest.fixture
def project(tmp_path, environment):
    project = Project(tmp_path, environment)
    yield project
    kill_at(project.home)


pytestmark = pytest.mark.slow


def test_a_users_own_tuner_and_assessor_run(project):
    project.write(
        "tuner.py",
        """
        import checks, config, own, progress, text

        for module in (config, own, progress, text):
            assert module.Constant
        class Mine(checks.Constant):
            optimize_mode = "minimize"
        """,
    )
    tuner = OWN | {"className": "tuner.Mine"}
    assessor = OWN | {"className": "text.Patient", "classArgs": {"patience": 3}}
    out, given = project.succeeds(tuner=tuner, assessor=assessor, searchSpace={})
    assert given == [{"x": 7, "space": {}}] * 2  # the same combination twice
    assert "the least result" in out
    assert "The greatest result counts as the best: " not in out


def test_a_users_own_advisor_runs(project):
    tuner = OWN | {"className": "progress.Counter"}
    out, given = project.succeeds(tuner=tuner, searchSpace=[1, "two"])
    assert given == [{"x": 0, "space": [1, "two"]}, {"x": 1, "space": [1, "two"]}]
    assert "the least result" not in out
    assert out.count("The greatest result counts as the best: ") == 1


def test_folders_of_any_name(project, monkeypatch):
    strange = project.folder.with_name('it\'s $HOME `id` "my" \\n;\n项目')
    shutil.copytree(ROOT / "nnisearch", strange / "nnisearch")
    (strange / "env").symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(strange / "env" / "bin" / "python3"))
    project.folder = project.folder.rename(strange / "project")
    project.home = project.home.rename(strange / "home")
    stand_in_nvidia_smi(project.home, busy=[False])
    folders = {"HOME": str(project.home), "TMPDIR": str(project.home), "PYTHONPATH": str(strange)}
    project.environment |= folders | {"PATH": f"{project.home}:{project.environment['PATH']}"}
    space = {"x": {"_type": "mine", "_value": 3}, "y": 1}
    _, given = project.succeeds(
        trials=1,
        maxTrialNumber=1,
        trialCommand=COMMANDS[-1],
        tuner=OWN | {"className": "config.Constant"},
        searchSpace=space,
        experimentWorkingDirectory=str(project.home / "experiments"),
        trainingService={"platform": "local", "useActiveGpu": False},
        trialGpuNumber=1,
    )
    assert given == [{"x": 7, "space": space}]
    assert not project.folder.joinpath("stdout").exists()


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="NNI's annotation reads ast.Constant.s, which 3.14 removed"
)
def test_annotation(project):
    project.write(
        "trial.py",
        '''
        import sys
        sys.modules["pandas"] = None  # then NNI's import takes half of the time
        import nni
        """@nni.get_next_parameter()"""
        """@nni.variable(nni.choice(0.25, 0.5), name=x)"""
        x = 0.1
        """@nni.report_final_result(x)"""
        ''',
    )
    out, given = project.succeeds(useAnnotation=True, searchSpace=None)
    assert [list(values.values()) for values in given] in ([[0.25], [0.5]], [[0.5], [0.25]])
    assert "best 0.5" in out


def test_a_tuner_by_its_alias_and_a_space_that_is_smaller_than_the_number_of_trials(project):
    values = [{"a": [1, 2]}, {"a": {"b": 1}}, {"a": None}, {"a": "text"}]
    space = {"combine_params": {"_type": "choice", "_value": values}}
    tuner = {"name": "BatchTuner"}
    _, given = project.succeeds(searchSpace=space, trials=4, tuner=tuner, maxTrialNumber=99999)
    assert given == values


def test_version_1_and_pbt_without_a_folder(project):
    arguments = {"optimize_mode": "maximize", "population_size": 2}
    version_1 = {
        "authorName": "me",
        "experimentName": "old",
        "trialConcurrency": 1,
        "maxExecDuration": "1h",
        "maxTrialNum": 2,
        "trainingServicePlatform": "local",
        "searchSpacePath": "space.json",
        "useAnnotation": False,
        "tuner": {"builtinTunerName": "PBTTuner", "classArgs": arguments},
        "trial": {"command": "python3 trial.py", "codeDir": ".", "gpuNum": 0},
    }
    project.write("space.json", json.dumps(CONFIG["searchSpace"]))
    project.write("config.yml", yaml.safe_dump(version_1))
    project.succeeds()


COMMANDS = [
    "python3 trial.py # don't",
    "python3 trial.py > log 2>&1",
    "python3 trial.py | tee log",
    "python3 trial.py && true",
    "exec python3 trial.py",
    "python3 trial.py; cat; exit 0",  # its input is empty
    "python3 trial.py && touch $NNI_OUTPUT_DIR/out && test -d $NNI_OUTPUT_DIR",
    "python3 - <<EOF\nimport runpy\nrunpy.run_path('trial.py', run_name='__main__')\nEOF",
    'test "$(pwd)" = "$NNI_CODE_DIR" && python3 trial.py --data-dir ~/d "it\'s"',
]
PROPOSAL = '{"parameter_id": 0, "parameters": {"x": 0.5}}'


@pytest.fixture
def rehearse_trial(project, monkeypatch):
    """Rehearse a trial command alone; return why it fails, and whether it has asked for x."""
    monkeypatch.setenv("PATH", project.environment["PATH"])
    with Watchdog(project.home / "search", "create") as watchdog:

        def rehearse_trial(command):
            project.configure(trialCommand=command)
            folder = project.home / f"trial{len(os.listdir(project.home))}"
            found = config.load(project.folder / "config.yml")
            return rehearsal.rehearse_trial(found, folder, PROPOSAL, 0, None, watchdog)

        yield rehearse_trial


def test_a_trial_command_that_fails_is_explained(rehearse_trial):
    assert "pyton: command not found" in rehearse_trial("pyton trial.py")[0]
    assert "it fails with status 3" in rehearse_trial("exit 3; python3 trial.py")[0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tuner": {"name": "Hyperband"}}, "nnisearch.tuners.Hyperband"),
        ({"tuner": {"name": "NetworkMorphism"}}, "tuner.name is 'NetworkMorphism'; allowed: "),
        ({"tuner": {"name": "TPE", "classArgs": {"foo": 1}}}, "tuner is TPE with {'foo': 1}: "),
        ({"tuner": OWN | {"className": "nowhere.Mine"}}, "No module named 'nowhere'"),
        ({"assessor": OWN | {"className": "own.Patient"}}, "assessor is own.Patient: TypeError: "),
        ({"trialCommand": "python3 trial.py --data $("}, "trialCommand is "),
        ({"trialCommand": "python3 -c 'import nopackage'"}, "No module named 'nopackage'"),
        ({"trialCommand": None}, "trialCommand is None; allowed: a text"),
        ({"tuner": {"name": "TPE", "classArgs": {"optimize_mode": "max"}}}, "; allowed: maximize"),
        ({"trainingServicePlatform": "adl"}, "config.yml: a configuration of version 1; allowed: "),
    ],
)
def test_projects_that_nni_cannot_run_are_refused(project, monkeypatch, capsys, changes, part):
    """They are refused in one line, and nothing is left of them."""
    project.configure(**changes)
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(cli.signals, "end_by_exit", lambda: None)
    with mock.patch.dict(os.environ, project.environment, clear=True):
        result = as_process(capsys, cli.main, ["config.yml", "-p", str(free_port())])
    assert result.returncode == 1, result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("nnisearch: error: ")
    assert part in line
    assert list(project.home.glob("nni-experiments/????????")) == []
