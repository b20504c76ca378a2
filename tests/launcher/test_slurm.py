"""Searches whose trials are jobs of a SLURM cluster: two nodes, started by the test."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import nni_node
import pytest
import yaml
from cluster import Cluster, missing
from conftest import ENDLESS, LIGHT_TRIAL, ROOT, SPACE
from experiment import MANAGER, SEARCH, processes_at
from held_trial import REPORTS, let_pass
from machines import make_program
from waiting import wait_for

from nnisearch import elsewhere
from nnisearch.before import config as configuration
from nnisearch.elsewhere import slurm
from nnisearch.results.database import Trials
from nnisearch.shared.text import reason

CONFIG = yaml.safe_load((ROOT / "configs" / "slurm.yml").read_text())
SRUN = CONFIG["trialCommand"].replace("python3 train.py", LIGHT_TRIAL)
HELD = CONFIG["trialCommand"].replace("train.py", "tests/support/held_trial.py")
LOSES_ITS_NODE = "echo 'srun: error: Node failure on n1' >&2 && exit 1"


@pytest.fixture
def cluster(tmp_path, environment, monkeypatch):
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path / "cluster")
    environment |= cluster.environment
    for key, value in cluster.environment.items():
        monkeypatch.setenv(key, value)
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def search(experiment):
    """Start a search of configs/slurm.yml with light trials."""

    def search(**changes):
        return experiment("configs/slurm.yml", **{"trialCommand": SRUN} | changes)

    return search


def trials_of(search):
    trials = Trials(search.home / "nni-experiments" / search.id / "db" / "nni.sqlite")
    trials.update()
    return list(trials.by_id.values())


def running(search):
    """Return the IDs of the running trials that have reported."""
    return [each.id for each in trials_of(search) if each.status == "RUNNING" and each.intermediate]


def test_a_search_waits_in_the_queue_and_loses_no_trial_with_its_node(cluster, search, tmp_path):
    everything = ["srun", "--partition=urgent", "--nodes=2", "--exclusive"]
    with subprocess.Popen([*everything, "sleep", "1000"]) as others:
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

    def again(why):
        return said.read_text().count(f"SLURM has ended its job: {why}")

    cluster.kill_node("n2")
    wait_for(lambda: again("NODE_FAIL") == 2)
    assert "is run again (1 of at most 3): SLURM has ended its job: NODE_FAIL" in said.read_text()
    cluster.start_node("n2")
    wait_for(lambda: len(running(one)) == 4)
    subprocess.run([*everything, "true"], check=True)
    wait_for(lambda: again("PREEMPTED") == 4)
    wait_for(lambda: len(running(one)) == 4)
    let_pass(one.home, 5)
    trials = one.wait(240)
    assert watcher.wait(60) == 0, said.read_text()
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 5
    assert sorted(trial["sequenceId"] for trial in trials) == list(range(5))
    for trial in trials_of(one):
        assert len(trial.intermediate) == REPORTS
        assert trial.start >= in_queue_until
        metrics = one.get(f"metric-data/{trial.id}")
        assert [metric["type"] for metric in metrics].count("FINAL") == 1
    assert {urlsplit(trial["logPath"]).hostname for trial in trials} == {"n1", "n2"}
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

    notices = one.home / "nni-experiments" / one.id / "log" / "notices.log"
    wait_for(lambda: of_status("FAILED"))
    assert "(3 of at most 3): srun: error: Node failure on n1" in notices.read_text()
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


def prepare(folder, command):
    """Prepare a search that runs a command; return elsewhere.js's settings."""
    config, _ = configuration.load(ROOT / "configs" / "slurm.yml")
    config.trial_command, config.trial_code_directory = command, str(folder)
    return elsewhere.prepare(config, "search", folder, False)


def test_a_trial_runs_once(cluster, tmp_path, monkeypatch, capsys):
    own = tmp_path / "trial"
    (own / ".nni").mkdir(parents=True)
    monkeypatch.setenv("NNI_SYS_DIR", str(own))
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")

    def run(command):
        environment = os.environ | prepare(tmp_path, command)["environment"]
        how = {"env": environment, "stdout": subprocess.PIPE, "text": True, "timeout": 120}
        return subprocess.run(["bash", "-c", command], **how).stdout

    once = "srun --partition=whole sh -c 'echo $NNI_SYS_DIR'"
    assert run(once) == f"{own}\n"
    assert (own / ".nni" / "elsewhere").read_text().split()[1] in ("n1", "n2")
    assert run("srun --ntasks=2 echo x") == "x\nx\n"  # who asks for it gets it
    assert "several" in (own / ".nni" / "elsewhere").read_text().split()

    # In an allocation, whose variables srun reads.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    both = f"{once} & {once}; wait".replace("--partition=whole ", "")
    both = both.replace("echo", "sleep 3; date +%s; echo")
    environment = prepare(tmp_path, both)["environment"]
    assert "within SLURM's job 7" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_JOB_ID")
    assigned = " ".join(f"{key}={value}" for key, value in environment.items())
    command = ["salloc", "--ntasks=2", "bash", "-c", f"export {assigned}; {both}"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    times = sorted(int(line) for line in said.split() if line.isdigit())
    assert said.count(str(own)) == 2 and times[1] - times[0] < 3  # both at a time


HOOKS = """
const [elsewhere, ...given] = process.argv.slice(1);
const [settings, job] = given.map((text) => JSON.parse(text));
const said = [];
const hooks = require(elsewhere)({ elsewhere: settings, say: (line) => said.push(line) });
hooks.lost(job).then((lost) => console.log(JSON.stringify({ lost, said })));
"""
REFUSED = "srun: error: Unable to allocate resources: "


@pytest.mark.parametrize(
    ("printed", "state", "again", "words"),
    [
        (f"{REFUSED}Invalid partition name specified", "", None, ""),
        (f"{REFUSED}Requested node configuration is not available", "", None, ""),
        (f"{REFUSED}Job violates accounting/QOS policy (job submit limit, ...)", "", 4000, "limit"),
        (f"{REFUSED}Unable to contact slurm controller (connect failure)", "", 4000, "contact"),
        (f"{REFUSED}Socket timed out on send/recv operation", "", 4000, "timed out"),
        ("slurmstepd: error: *** STEP 2.0 ON n1 CANCELLED AT ... ***", "PREEMPTED", 0, ""),
        ("ValueError", "FAILED PreemptTime=2026-12-01T01:48:35", 0, ""),
        ("ValueError", "FAILED PreemptTime=None", None, ""),
        ("ValueError", "FAILED", None, ""),
        ("ValueError", "BOOT_FAIL", 0, ""),
        ("srun: error: Node failure on n1", "NODE_FAIL", 0, ""),
        ("slurmstepd: error: *** JOB 2 CANCELLED DUE TO TIME LIMIT ***", "TIMEOUT", None, ""),
        ("srun: error: Node failure on n1", "CANCELLED", None, ""),
        ("srun: error: Application launch failed: no route", "", 0, ""),
        ("slurmstepd: error: --task-prolog failed status=127", "FAILED", None, "share|not have"),
    ],
)
def test_slurm_is_asked_how_a_job_has_ended(tmp_path, printed, state, again, words):
    make_program(
        tmp_path / "scontrol", f"#!/bin/sh\n[ $4 = 5 ] && echo 'JobId=5 JobState={state}'\n"
    )
    (tmp_path / ".nni").mkdir()
    (tmp_path / ".nni" / "elsewhere").write_text("1796087806106 n1 5\n" if state else "")
    (tmp_path / "stderr").write_text(printed)
    job = {
        "id": "t",
        "form": {"sequenceId": 0},
        "again": 2,
        "end": {"status": int(state != "NODE_FAIL")},
    }
    job["workingDirectory"] = str(tmp_path)
    settings = {"kind": "slurm", "name": "nni-search-", "environment": {}}
    node = Path(nni_node.__path__[0], "node")
    script = ROOT / "nnisearch" / "manager" / "elsewhere.js"
    answer = subprocess.run(
        [node, "-e", HOOKS, script, json.dumps(settings), json.dumps(job)],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    found = json.loads(answer.stdout)
    assert found.get("lost", {}).get("pause") == again
    assert any(word in "".join(found["said"]) for word in words.split("|"))


def test_jobs_of_a_killed_manager_are_cancelled_again_until_slurm_answers(
    tmp_path, monkeypatch, capsys
):
    make_program(
        tmp_path / "squeue",
        f"#!/bin/sh\ncd {tmp_path}; echo x >> asked; [ $(wc -l < asked) -gt 2 ] && exit\n"
        "[ $(wc -l < asked) = 2 ] && echo 'nni-search-t|RUNNING (None)' && exit\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n",
    )
    make_program(tmp_path / "scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm.cancel_jobs("search")
    assert "it is tried again: squeue: slurm_load_jobs error: Unable" in capsys.readouterr().out
    assert "--name nni-search-t" in (tmp_path / "cancelled").read_text()


@pytest.mark.parametrize(
    ("command", "script", "is_used"),
    [
        ("srun python3 train.py", "", True),
        ("OMP_NUM_THREADS=1 /usr/bin/srun --gpus=1 x", "", True),
        ("bash run.sh", "cd x && srun python3 train.py", True),
        ("python3 run.py", "# not by srun here", False),
        ("python3 srun.py", "", False),
        ("sbatch run.sh", "#SBATCH", False),
        ("sbatch --wait run.sh", "#SBATCH", False),
    ],
)
def test_srun_is_found_in_the_command_or_its_script(
    tmp_path, monkeypatch, capsys, command, script, is_used
):
    for name in ("srun", "sbatch", "squeue"):
        make_program(tmp_path / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("run.sh", "run.py"):
        (tmp_path / name).write_text(script)
    assert (prepare(tmp_path, command) is not None) == is_used
    assert ("ends each trial" in capsys.readouterr().out) == (command == "sbatch run.sh")


TRACEBACK = "Traceback (most recent call last):\n  File ...\nValueError: lr is nan\n"
LIMIT = "slurmstepd: error: *** STEP 2.0 ON n1 CANCELLED AT 2026-11-27 DUE TO TIME LIMIT ***"
EXIT = "srun: error: n1: task 0: Exited with exit code 3"


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        (f"{LIMIT}\nsrun: error: n1: task 0: Terminated", LIMIT),
        ("srun: error: n1: task 0: Out Of Memory", "srun: error: n1: task 0: Out Of Memory"),
        (f"{TRACEBACK}{EXIT}", "ValueError: lr is nan"),
        (
            f"run.sh: line 1: conda: command not found\n{EXIT}",
            "run.sh: line 1: conda: command not found",
        ),
        (EXIT, EXIT),
    ],
)
def test_slurms_error_is_the_reason_if_slurm_ended_the_job(printed, why):
    assert reason(printed) == why
