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
from experiment import free_port, processes_at
from stand_ins import stand_in_nvidia_smi

TRIAL = (ROOT / "tests" / "support" / "other_project.py").read_text()
CONFIG = {
    "searchSpace": {"x": {"_type": "uniform", "_value": [0, 1]}},
    "trialCommand": "python3 trial.py",
    "trialConcurrency": 2,
    "maxTrialNumber": 2,
    "tuner": {"name": "Random"},
    "trainingService": {"platform": "local"},
}


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

    def write(self, name, text):
        (self.folder / name).write_text(textwrap.dedent(text))

    def search(self, *flags, prefix=(), **changes):
        """Run nnisearch on CONFIG with changes, to its end, and stop the experiment then."""
        config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        self.write("config.yml", yaml.safe_dump(config, allow_unicode=True))
        return self.run("config.yml", *flags, prefix=prefix)

    def run(self, *args, prefix=()):
        command = [*prefix, sys.executable, "-c", "import sys; from nnisearch import cli; "]
        command[-1] += "sys.path.pop(0); sys.exit(cli.main())"
        result = subprocess.run(
            [*command, *args, "-p", str(free_port())],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        for process in processes_at(self.home):
            process.kill()
        return result

    def trials(self):
        """Return (status, parameters) of each trial of the one experiment, in their order."""
        (database,) = self.home.glob("*/[!_]*/db/nni.sqlite")
        with contextlib.closing(sqlite3.connect(database)) as rows:
            columns = "trialJobId, event, data"
            events = rows.execute(f"SELECT {columns} FROM TrialJobEvent ORDER BY rowid").fetchall()
        given = {id: json.loads(data)["parameters"] for id, event, data in events if data}
        last = {id: event for id, event, _ in events}
        return [(last[id], given[id]) for id in given]

    def succeeds(self, *flags, trials=2, **changes):
        """Search, and check that so many trials have succeeded; return the output and them."""
        result = self.search(*flags, **changes)
        assert result.returncode == 0, result.stdout + result.stderr
        found = self.trials()
        assert [status for status, _ in found] == ["SUCCEEDED"] * trials, result.stdout
        assert "Traceback" not in result.stderr
        return result.stdout, [given for _, given in found]

    def refused(self, *flags, **changes):
        """Search, and check that it is refused in one line, of which nothing is left."""
        result = self.search(*flags, **changes)
        assert result.returncode != 0, result.stdout
        (line,) = result.stderr.splitlines()
        assert line.startswith("nnisearch: error: ")
        assert list(self.home.glob("nni-experiments/????????")) == []
        return line


@pytest.fixture
def project(tmp_path, environment):
    project = Project(tmp_path, environment)
    yield project
    for process in processes_at(project.home):
        process.kill()


pytestmark = pytest.mark.slow


def test_aliases_of_nnis_tuners_are_accepted(project):
    values = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    space = {"combine_params": {"_type": "choice", "_value": values}}
    _, given = project.succeeds(tuner={"name": "BatchTuner"}, searchSpace=space)
    assert given == values


def test_pbt_without_a_folder(project):
    arguments = {"optimize_mode": "maximize", "population_size": 2}
    project.succeeds(tuner={"name": "PBTTuner", "classArgs": arguments})


@pytest.mark.parametrize("name", ["tuner", "checks", "progress", "config", "text"])
def test_a_users_own_tuner_may_be_in_a_module_of_any_name(project, name):
    project.write("helper.py", "VALUE = 7\n")
    project.write(
        f"{name}.py",
        """
        from helper import VALUE
        from nni.tuner import Tuner

        class Mine(Tuner):
            optimize_mode = "minimize" if __name__ == "tuner" else None

            def update_search_space(self, search_space):
                self.space = search_space
            def generate_parameters(self, parameter_id, **kwargs):
                return {"x": VALUE, "space": self.space}
            def receive_trial_result(self, *args, **kwargs):
                pass
        """,
    )
    spaces = {"tuner": {}, "checks": [1, "two"], "progress": {"x": {"_type": "mine", "_value": 3}}}
    space = spaces.get(name, {"x": 1})
    tuner = {"codeDirectory": ".", "className": f"{name}.Mine"}
    out, given = project.succeeds(tuner=tuner, searchSpace=space)
    assert given == [{"x": 7, "space": space}] * 2  # the same combination twice
    assert ("the least result" in out) == (name == "tuner")
    assert out.count("The greatest result counts as the best: ") == (name != "tuner")


def test_a_users_own_advisor_runs(project):
    project.write(
        "mine.py",
        """
        import json
        from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
        from nni.runtime.tuner_command_channel import CommandType

        class Advisor(MsgDispatcherBase):
            count = 0
            def __init__(self):
                import os
                super().__init__(os.environ["NNI_TUNER_COMMAND_CHANNEL"])
            def handle_initialize(self, data):
                self.send(CommandType.Initialized, "")
            def handle_request_trial_jobs(self, data):
                for _ in range(data):
                    given = {"parameter_id": self.count, "parameters": {"x": self.count}}
                    self.count += 1
                    self.send(CommandType.NewTrialJob, json.dumps(given))
            def handle_report_metric_data(self, data):
                pass
            def handle_trial_end(self, data):
                pass
        """,
    )
    tuner = {"codeDirectory": ".", "className": "mine.Advisor"}
    _, given = project.succeeds(tuner=tuner)
    assert given == [{"x": 0}, {"x": 1}]


def test_a_users_own_assessor_runs(project):
    project.write(
        "mine.py",
        """
        from nni.assessor import Assessor, AssessResult

        class Patient(Assessor):
            def __init__(self, patience):
                self.patience = patience
            def assess_trial(self, trial_job_id, trial_history):
                return AssessResult.Good
        """,
    )
    patient = {"codeDirectory": ".", "className": "mine.Patient"}
    project.succeeds(assessor=patient | {"classArgs": {"patience": 3}})
    project.home.joinpath("nni-experiments").rename(project.home / "before")
    line = project.refused(assessor=patient)
    assert "assessor is mine.Patient: TypeError: " in line


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="NNI's annotation reads ast.Constant.s, which 3.14 removed"
)
def test_annotation(project):
    project.write(
        "trial.py",
        '''
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


def test_a_grid_of_seven(project):
    space = {"x": {"_type": "quniform", "_value": [0.1, 0.7, 0.1]}}
    tuner = {"name": "GridSearch"}
    _, given = project.succeeds(tuner=tuner, searchSpace=space, maxTrialNumber=7, trials=7)
    assert sorted(round(values["x"], 3) for values in given) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_a_space_that_is_smaller_than_the_number_of_trials(project):
    space = {"x": {"_type": "choice", "_value": [1, 2]}}
    tuner = {"name": "GridSearch"}
    _, given = project.succeeds(tuner=tuner, searchSpace=space, maxTrialNumber=99999)
    assert sorted(values["x"] for values in given) == [1, 2]


def test_choices_of_lists_and_objects_and_nothing(project):
    values = [[1, 2], {"a": 1}, None, "text"]
    space = {"x": {"_type": "choice", "_value": values}}
    grid = {"tuner": {"name": "GridSearch"}, "maxTrialNumber": 4}
    _, given = project.succeeds(searchSpace=space, trials=4, **grid)
    assert sorted((v["x"] for v in given), key=repr) == sorted(values, key=repr)


@pytest.mark.parametrize(
    "command",
    [
        "python3 trial.py # don't",
        "python3 trial.py > log 2>&1",
        "python3 trial.py | tee log",
        "python3 trial.py && true",
        "exec python3 trial.py",
        "python3 trial.py; cat; exit 0",  # its input is empty
        "python3 trial.py && touch $NNI_OUTPUT_DIR/out && test -d $NNI_OUTPUT_DIR",
        "python3 - <<EOF\nimport runpy\nrunpy.run_path('trial.py', run_name='__main__')\nEOF",
        'test "$(pwd)" = $NNI_CODE_DIR && python3 trial.py --data-dir ~/d "it\'s"',
    ],
)
def test_a_trial_command_may_be_any_bash_script(project, command):
    project.succeeds(trialCommand=command)


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
    service = {"platform": "local", "useActiveGpu": False}
    experiments = str(project.home / "experiments")
    project.succeeds(
        experimentWorkingDirectory=experiments, trainingService=service, trialGpuNumber=1
    )
    assert not project.folder.joinpath("stdout").exists()


def test_version_1(project):
    version_1 = {
        "authorName": "me",
        "experimentName": "old",
        "trialConcurrency": 1,
        "maxExecDuration": "1h",
        "maxTrialNum": 2,
        "trainingServicePlatform": "local",
        "searchSpacePath": "space.json",
        "useAnnotation": False,
        "tuner": {"builtinTunerName": "TPE", "classArgs": {"optimize_mode": "maximize"}},
        "trial": {"command": "python3 trial.py", "codeDir": ".", "gpuNum": 0},
    }
    project.write("space.json", json.dumps(CONFIG["searchSpace"]))
    project.write("config.yml", yaml.safe_dump(version_1))
    result = project.run("config.yml")
    assert result.returncode == 0, result.stderr
    assert len(project.trials()) == 2


def test_a_version_1_that_nni_cannot_convert_is_refused(project):
    project.write("config.yml", "trainingServicePlatform: adl\ntrialConcurrency: 1\n")
    result = project.run("config.yml")
    assert result.returncode == 1
    assert "config.yml: a configuration of version 1; allowed: " in result.stderr


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"tuner": {"name": "Hyperband"}}, "nnisearch.tuners.Hyperband"),
        ({"tuner": {"name": "NetworkMorphism"}}, "tuner.name is 'NetworkMorphism'; allowed: "),
        ({"tuner": {"name": "TPE", "classArgs": {"foo": 1}}}, "tuner is TPE with {'foo': 1}: "),
        (
            {"tuner": {"className": "nowhere.Mine", "codeDirectory": "."}},
            "No module named 'nowhere'",
        ),
        ({"trialCommand": "python3 trial.py --data $("}, "trialCommand is "),
        ({"trialCommand": "python3 -c 'import nopackage'"}, "No module named 'nopackage'"),
        ({"trialCommand": "pyton trial.py"}, "pyton: command not found"),
        ({"trialCommand": "exit 3; python3 trial.py"}, "it fails with status 3"),
        ({"trialCommand": None}, "trialCommand is None; allowed: a text"),
        ({"tuner": {"name": "TPE", "classArgs": {"optimize_mode": "max"}}}, "; allowed: maximize"),
    ],
)
def test_projects_that_nni_cannot_run_are_refused(project, changes, part):
    assert part in project.refused(**changes)
