"""The template is for copying: another network and another data set, as the README shows it."""

import difflib
import json
import re
import shutil

import pytest
from conftest import ROOT
from experiment import SEARCH, Experiment, accuracy, processes_at


@pytest.mark.slow
def test_the_readmes_own_network_and_data_are_searched(tmp_path, home, environment):
    section = (ROOT / "README.md").read_text().split("## Your own network and data")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    ours, theirs = re.search(r"(def load_data.*)(class Net.*)", code, re.DOTALL).groups()

    project = tmp_path / "project"
    project.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    for folder in ("trial", "nnisearch"):
        shutil.copytree(ROOT / folder, project / folder)
    before = (ROOT / "train.py").read_text()
    after = re.sub(
        r"def load_data.*?\n\n\n", f"{ours.strip()}\n\n\n", before, count=1, flags=re.DOTALL
    )
    after = re.sub(
        r"class Net.*?\n\n\n", f"{theirs.strip()}\n\n\n", after, count=1, flags=re.DOTALL
    )
    (project / "train.py").write_text(after)
    changes = difflib.ndiff(before.splitlines(), after.splitlines())
    assert sum(change.startswith("+ ") for change in changes) < 30

    search = Experiment(
        ROOT / "configs" / "demo.yml",
        home,
        environment | {"PYTHONPATH": ""},
        [project / SEARCH[0].name],
        trialCommand="OMP_NUM_THREADS=1 python3 train.py",
        trialCodeDirectory=str(project),
        maxTrialNumber=2,
    )
    trials = search.wait(120)
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 2, [
        search.trial_file(trial, "stderr") for trial in trials
    ]
    for trial in trials:
        assert "/297)" in search.trial_file(trial, "trial.log")
        assert accuracy(trial) > 5
        assert json.loads(trial["hyperParameters"][0])["parameters"]
    assert search.stop() == []
    assert processes_at(home) == []
