"""Searches whose trials are jobs of a SLURM cluster: two nodes, started by the test."""

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from cluster import Cluster, missing
from conftest import ENDLESS, LIGHT_TRIAL, ROOT, SPACE
from experiment import MANAGER, SEARCH, processes_at
from held_trial import REPORTS, let_pass
from waiting import wait_for

from nnisearch.before import config as configuration
from nnisearch.before import rehearsal
from nnisearch.results.database import Trials
from nnisearch.shared import slurm
from nnisearch.shared.text import reason
from nnisearch.start.launch import Watchdog

CONFIG = yaml.safe_load((ROOT / "configs" / "slurm.yml").read_text())
SRUN = CONFIG["trialCommand"].replace("python3 train.py", LIGHT_TRIAL)
HELD = CONFIG["trialCommand"].replace("train.py", "tests/support/held_trial.py")
LOSES_ITS_NODE = "echo 'srun: error: Node failure on n1' >&2 && exit 1"
# As on NFS: inotify does not notice what another machine writes.
DEAF = "require('fs').watch = () => ({ close() {} });"


@pytest.fixture
def cluster(tmp_path, environment):
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path / "cluster")
    environment |= cluster.environment
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def search(experiment, environment, tmp_path):
    """Start a search of configs/slurm.yml with light trials, on a home that is like NFS."""
    (tmp_path / "deaf.js").write_text(DEAF)
    environment["NODE_OPTIONS"] = f"--require {tmp_path / 'deaf.js'}"

    def search(**changes):
        return experiment("configs/slurm.yml", **{"trialCommand": SRUN} | changes)

    return search


def trials_of(search):
    trials = Trials(search.home / "nni-experiments" / search.id / "db" / "nni.sqlite")
    trials.update()
    return list(trials.by_id.values())


def running(search, message=""):
    """Return the IDs of the running trials that have reported and have such a message."""
    return [
        trial.id
        for trial in trials_of(search)
        if trial.status == "RUNNING" and trial.intermediate and message in (trial.message or "")
    ]


def test_a_search_waits_in_the_queue_and_loses_no_trial_with_its_node(cluster, search, tmp_path):
    everything = ["srun", "--partition=urgent", "--nodes=2", "--exclusive"]
    how = {"env": os.environ | cluster.environment}
    with subprocess.Popen([*everything, "sleep", "1000"], **how) as others:
        wait_for(lambda: any("RUNNING" in job for job in cluster.jobs()))
        one = search(maxTrialNumber=5, searchSpace=SPACE, trialCommand=HELD)
        command = [sys.executable, *SEARCH, "--resume", one.id]
        said = tmp_path / "said"
        with said.open("w") as output:
            watcher = subprocess.Popen(
                command, env=one.environment, stdout=output, stderr=output, cwd=one.home
            )
        wait_for(lambda: "waits in SLURM's queue: PENDING (" in said.read_text())
        assert {trial.status for trial in trials_of(one)} == {"WAITING"}
        others.terminate()
    in_queue_until = time.time() * 1000
    wait_for(lambda: len(running(one)) == 4)
    cluster.kill_node("n2")
    wait_for(lambda: "run again (1 of at most 3): srun: error: Node failure" in said.read_text())
    cluster.start_node("n2")
    wait_for(lambda: len(running(one, "Node failure")) == 2)
    subprocess.run([*everything, "true"], **how, check=True)
    wait_for(lambda: len(running(one, "PREEMPTION")) == 4)
    let_pass(one.home, 5)
    trials = one.wait(240)
    assert watcher.wait(60) == 0, said.read_text()
    assert "DUE TO PREEMPTION" in said.read_text()
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    assert sorted(trial["sequenceId"] for trial in trials) == list(range(5))
    for trial in trials_of(one):
        assert len(trial.intermediate) == REPORTS
        assert trial.start >= in_queue_until
        metrics = one.get(f"metric-data/{trial.id}")
        assert [metric["type"] for metric in metrics].count("FINAL") == 1
    assert {urlsplit(trial.path).hostname for trial in trials_of(one)} == {"n1", "n2"}
    assert one.stop() == []


def test_no_job_outlives_its_trial_or_its_search(cluster, search):
    one = search(
        searchSpace=ENDLESS,
        trialConcurrency=5,
        maxTrialDuration="20s",
        trialCommand=f"[ $NNI_TRIAL_SEQ_ID = 0 ] && {LOSES_ITS_NODE}; {SRUN}",
    )

    def of_status(status):
        return [trial.id for trial in trials_of(one) if trial.status == status]

    def has_no_job(*trials):
        return not any(job.split("|")[1][4:].endswith(trials) for job in cluster.jobs())

    (lost,) = wait_for(lambda: [t for t in trials_of(one) if t.status == "FAILED"])
    assert "run again (3 of at most 3): srun: error: Node failure on n1" in lost.message
    wait_for(lambda: len(running(one)) == 4)
    for killed in (running(one)[0], wait_for(lambda: of_status("WAITING"))[0]):  # two GPUs a node
        one.request("DELETE", f"trial-jobs/{killed}")
        wait_for(lambda killed=killed: killed in of_status("USER_CANCELED") and has_no_job(killed))
    wait_for(lambda: has_no_job(*wait_for(lambda: of_status("EARLY_STOPPED"))))

    wait_for(lambda: len(running(one)) == 4)
    for process in [*processes_at(one.home, MANAGER), *processes_at(one.home, "srun ")]:
        process.kill()
    wait_for(lambda: not processes_at(one.home, MANAGER))
    one.resume()
    wait_for(lambda: len(running(one)) == 4)
    names = [job.split("|")[1] for job in cluster.jobs() if "COMPLETING" not in job]
    assert len(names) == len(set(names))
    assert one.stop() == []
    wait_for(lambda: cluster.jobs() == [])


def rehearse(command, folder, monkeypatch, cluster):
    """Return what rehearse_trial() returns of a trial command on the cluster."""
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    (folder / "search").mkdir(parents=True)
    config = configuration.load(ROOT / "configs" / "slurm.yml")
    config.trial_command = command
    monkeypatch.setenv("SLURM_TASK_PROLOG", "")
    slurm.prepare("search", folder / "search")
    proposal = '{"parameter_id": 0, "parameters": {"epochs": 1, "lr": 0.1}}'
    place = folder / "search" / "rehearsal"
    with Watchdog(folder / "search", "create") as watchdog:
        return rehearsal.rehearse_trial(config, place, proposal, 0, None, watchdog)


def test_a_rehearsal_is_a_job_that_may_fail(cluster, tmp_path, monkeypatch):
    why, _ = rehearse("srun --partition=none true", tmp_path, monkeypatch, cluster)
    assert "srun: error: Unable to allocate resources: Invalid partition name specified" in why
    assert rehearse(f"{LOSES_ITS_NODE}; srun x", tmp_path / "lost", monkeypatch, cluster)[0] is None


def test_a_search_does_not_wait_for_a_rehearsal_in_the_queue(
    cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rehearsal, "QUEUE_PATIENCE", 1)
    cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    why, _ = rehearse("srun true", tmp_path, monkeypatch, cluster)
    assert why is None
    assert "its trial is still in SLURM's queue: PENDING (" in capsys.readouterr().out
    wait_for(lambda: cluster.jobs() == [])


@pytest.mark.parametrize(
    ("command", "script", "is_used"),
    [
        ("srun python3 train.py", "", True),
        ("OMP_NUM_THREADS=1 /usr/bin/srun --gpus=1 x", "", True),
        ("bash run.sh", "cd x && srun python3 train.py", True),
        ("python3 run.py", "# not by srun here", False),
        ("python3 srun.py", "", False),
    ],
)
def test_srun_is_found_in_the_command_or_its_script(
    tmp_path, monkeypatch, command, script, is_used
):
    (tmp_path / "srun").touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("run.sh", "run.py"):
        (tmp_path / name).write_text(script)
    config = configuration.load(Path(ROOT, "configs", "slurm.yml"))
    config.trial_command, config.trial_code_directory = command, str(tmp_path)
    assert slurm.is_used(config) == is_used


TRACEBACK = "Traceback (most recent call last):\n  File ...\nValueError: lr is nan\n"
LIMIT = "slurmstepd: error: *** STEP 2.0 ON n1 CANCELLED AT 2026-11-27 DUE TO TIME LIMIT ***"


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        (f"{LIMIT}\nsrun: error: n1: task 0: Terminated", LIMIT),
        ("srun: error: n1: task 0: Out Of Memory", "srun: error: n1: task 0: Out Of Memory"),
        (f"{TRACEBACK}srun: error: n1: task 0: Exited with exit code 1", "ValueError: lr is nan"),
    ],
)
def test_slurms_error_is_the_reason_if_slurm_ended_the_job(printed, why):
    assert reason(printed) == why
