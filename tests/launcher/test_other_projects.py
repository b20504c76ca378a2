"""nnisearch with other projects' configurations, from their folders: what nnictl runs, it runs."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from experiment import free_port, kill_at
from projects import CONFIG, SUPPORT, TRIAL
from stand_ins import stand_in_nvidia_smi

OWN = {"codeDirectory": "."}  # of a user's own tuner or assessor
LOCAL = {"platform": "local", "trialCodeDirectory": "."}


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


OWN_TUNER = """
    import checks, config, own, progress, text

    for module in (config, own, progress, text):
        assert module.Constant
    class Mine(checks.Constant):
        optimize_mode = "minimize"
"""
VALUES = [{"a": [1, 2]}, {"a": {"b": 1}}, {"a": None}, {"a": "text"}]


@pytest.mark.parametrize(
    ("changes", "expected", "part"),
    [
        (
            {
                "tuner": OWN | {"className": "tuner.Mine"},
                "assessor": OWN | {"className": "text.Patient", "classArgs": {"patience": 3}},
                "searchSpace": {},
            },
            [{"x": 7, "space": {}}] * 2,  # the same combination twice
            "the least result",
        ),
        (  # an advisor, and keys where NNI prefers them
            {
                "tuner": OWN | {"className": "progress.Counter"},
                "searchSpace": [1, "two"],
                "trialCommand": "exit 3",
                "trialCodeDirectory": "/",
                "trainingService": LOCAL | {"trialCommand": "python3 trial.py"},
            },
            [{"x": 0, "space": [1, "two"]}, {"x": 1, "space": [1, "two"]}],
            "The greatest result counts as the best",
        ),
        (  # a tuner by its alias, and fewer combinations than trials
            {
                "tuner": {"name": "BatchTuner"},
                "searchSpace": {"combine_params": {"_type": "choice", "_value": VALUES}},
                "maxTrialNumber": 99999,
            },
            VALUES,
            "",
        ),
    ],
    ids=["tuner", "advisor", "batch"],
)
def test_what_nni_runs_runs(project, changes, expected, part):
    project.write("tuner.py", OWN_TUNER)
    out, given = project.succeeds(trials=len(expected), **changes)
    assert given == expected
    assert part in out


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
        trialCommand='test "$(pwd)" = "$NNI_CODE_DIR" && python3 trial.py --data-dir ~/d "it\'s"',
        tuner=OWN | {"className": "config.Constant"},
        searchSpace=space,
        experimentWorkingDirectory=str(project.home / "experiments"),
        trainingService={"platform": "local", "useActiveGpu": False},
        trialGpuNumber=1,
    )
    assert given == [{"x": 7, "space": space}]
    assert not project.folder.joinpath("stdout").exists()


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
