"""nnisearch by itself, as a wheel, for a project elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from documents import examples
from experiment import free_port

PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.mark.slow
def test_the_wheel_searches_from_another_projects_folder(tmp_path, environment, home):
    source, wheels, installed, project = (
        tmp_path / name for name in ("source", "wheels", "installed", "project")
    )
    left_out = shutil.ignore_patterns(".*", "data", "docs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    project.mkdir()
    (project / "trial.py").write_text(examples("docs/launcher.md", "python")[0])
    (project / "config.yml").write_text(examples("docs/launcher.md", "yaml")[0])
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    places = {"HOME": str(home), "TMPDIR": str(home), "PATH": path, "PYTHONPATH": str(installed)}

    def run(*args):
        command = [sys.executable, *map(str, args)]
        how = {"cwd": project, "env": environment | places, "stdout": subprocess.PIPE, "text": True}
        return subprocess.run(command, check=True, **how).stdout

    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source)
    (wheel,) = wheels.iterdir()
    run(*PIP, "install", "--no-deps", "--no-index", "-t", installed, wheel)
    requirements = (installed / f"{wheel.name[:13]}.dist-info" / "METADATA").read_text()
    assert "Requires-Dist: nni==2.10.1" in requirements
    assert "torch" not in requirements
    printed = run(installed / "bin" / "nnisearch", "config.yml", "-p", free_port())
    assert "4 of 4 trials have a result" in printed
    assert len(json.loads(run(installed / "bin" / "nnichoose", "--json"))["trials"]) == 4
    run(installed / "bin" / "nnichoose", "--out", "best.json")
    assert json.loads((project / "best.json").read_text())["hyperparameters"]
    run("trial.py", "--params", "best.json")


def test_the_launcher_imports_nothing_of_the_trial():
    above = {"trial", *(path.stem for path in ROOT.glob("*.py"))}
    for path in (ROOT / "nnisearch").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert not above & set(imported), path
        assert "mock" not in path.read_text(), path
