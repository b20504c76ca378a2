"""nnisearch by itself: as a wheel, for a project elsewhere; and the trial without it."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SPACE
from experiment import free_port
from nni.experiment import rest
from projects import CONFIG, TRIAL
from stand_ins import stand_in_nvidia_smi

pytestmark = pytest.mark.slow


@pytest.fixture
def home(home, environment):
    """That HOME, and what is installed there, for the processes that a test starts."""
    environment["HOME"] = environment["TMPDIR"] = str(home)
    environment["PYTHONPATH"] = ""
    environment["PATH"] = f"{home}:{Path(sys.executable).parent}:{environment['PATH']}"
    return home


def test_the_wheel_searches_from_another_projects_folder(tmp_path, environment, home):
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "data", "docs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-t", installed, wheel], check=True)
    requirements = (installed / f"{wheel.name[:13]}.dist-info" / "METADATA").read_text()
    assert "Requires-Dist: nni==2.10.1" in requirements
    assert "torch" not in requirements

    project = tmp_path / "project"
    project.mkdir()
    (project / "trial.py").write_text(TRIAL)
    (project / "config.yml").write_text(yaml.safe_dump(CONFIG))
    environment["PYTHONPATH"] = str(installed)
    command = [sys.executable, installed / "bin" / "nnisearch", "config.yml", "-p", free_port()]
    result = subprocess.run(
        list(map(str, command)), cwd=project, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "2 of 2 trials have a result" in result.stdout
    chosen = subprocess.run(
        [sys.executable, installed / "bin" / "nnichoose", "--csv"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(chosen.stdout.splitlines()) == 3


def test_without_the_launcher_nnictl_still_runs_the_trial(tmp_path, environment, home):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "train.py", project)
    shutil.copytree(ROOT / "trial", project / "trial")
    (project / "trial" / "fast.py").unlink()  # may be deleted, too
    config = yaml.safe_load((ROOT / "config.yml").read_text())
    config["trialCommand"] += " --dataset synthetic --device cpu"
    config |= {"searchSpace": SPACE, "maxTrialNumber": 1}
    del config["searchSpaceFile"]
    (project / "config.yml").write_text(yaml.safe_dump(config))
    stand_in_nvidia_smi(home, busy=[False])
    port = free_port()
    # nnictl gives its server three seconds, which a busy machine may not keep to.
    create = "import sys; from nni.experiment import launcher; from nni.tools.nnictl import nnictl;"
    create += "launcher._check_rest_server.__defaults__ = (60, None); nnictl.parse_args()"
    subprocess.run(
        [sys.executable, "-c", create, "create", "-c", "config.yml", "-p", str(port)],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
    )
    end = time.monotonic() + 240
    while rest.get(port, "/check-status")["status"] != "DONE":
        assert time.monotonic() < end
        time.sleep(1)
    assert [trial["status"] for trial in rest.get(port, "/trial-jobs")] == ["SUCCEEDED"]


def test_the_launcher_imports_nothing_of_the_trial():
    above = {"trial", *(path.stem for path in ROOT.glob("*.py"))}
    for path in (ROOT / "nnisearch").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert not above & set(imported), path
        assert "mock" not in path.read_text(), path
