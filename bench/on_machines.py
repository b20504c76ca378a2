"""Compare trials on other machines with the same trials on this one: over SSH, or by SLURM.

    python bench/on_machines.py ssh      # three machines on loopback addresses; needs sshd
    python bench/on_machines.py slurm    # two nodes on this machine; as root, needs SLURM and munge

A trial only sleeps: what is more than that is the launcher's. The last column is the CPU time of
NNI's manager.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from compare import hardware

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from cluster import Cluster
from experiment import MANAGER, ROOT, UNCHECKED, Experiment, processes_at
from machines import Machine, make_key, make_ssh


def measure(name, at_a_time, trials, environment, config="demo.yml", **changes):
    """Run a search, and print its row of the table."""
    changes |= {"trialConcurrency": at_a_time, "maxTrialNumber": trials}
    changes |= {"searchSpace": {"rate": {"_type": "uniform", "_value": [0, 1]}}}
    changes |= {"tuner": {"name": "Random"}}
    with tempfile.TemporaryDirectory() as home:
        path = ROOT / "configs" / config
        search = Experiment(path, Path(home), os.environ | environment, UNCHECKED, **changes)
        try:
            ended = search.wait(3600)
            (manager,) = processes_at(home, MANAGER)
            spent = manager.cpu_times()
        finally:
            search.stop()
    if failed := [trial["status"] for trial in ended if trial["status"] != "SUCCEEDED"]:
        raise RuntimeError(f"{len(failed)} trials of {trials} ended {', '.join(failed)}")
    starts, ends = (sorted(t[key] / 1000 for t in ended) for key in ("startTime", "endTime"))
    gaps = [start - end for start, end in zip(starts[at_a_time:], ends[:-at_a_time], strict=True)]
    seconds = median((trial["endTime"] - trial["startTime"]) / 1000 for trial in ended)
    cells = [name, f"{at_a_time}", f"{seconds:.2f}", f"{mean(gaps):.2f}"]
    print(f"| {' | '.join(cells)} | {(spent.user + spent.system) / trials:.3f} |", flush=True)


@contextlib.contextmanager
def over_ssh(folder):
    """Start three machines.

    Yields what starts a command there, the numbers of trials at a time, and a search's environment
    and changes.
    """
    ssh = make_ssh(folder / "ssh")
    make_key(folder / "key")
    with contextlib.ExitStack() as stack:
        machines = []
        for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            machines.append(Machine(address, folder / address, folder / "key", ssh))
            stack.callback(machines[-1].die)
        service = {"platform": "remote", "machineList": [each.settings for each in machines]}
        environment = {"PATH": f"{ssh}:{os.environ['PATH']}"}
        yield "", [3], environment, {"trainingService": service, "nniManagerIp": "127.0.0.1"}


@contextlib.contextmanager
def by_slurm(folder):
    """Start a cluster; yield what over_ssh() does."""
    cluster = Cluster(folder / "slurm")
    try:
        cluster.boot()
        yield "srun ", [2, 50], cluster.environment, {"config": "slurm.yml"}
    finally:
        cluster.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    places = {"ssh": over_ssh, "slurm": by_slurm}
    parser.add_argument("place", choices=places, help="where the trials run")
    parser.add_argument("--seconds", type=int, default=3, help="how long a trial sleeps")
    parser.add_argument("--trials", type=int, default=60, help="per row, more than 50 with SLURM")
    args = parser.parse_args()
    sleep = f"sleep {args.seconds}"
    print(f"{hardware()}\n{args.trials} trials of {sleep} per row\n")
    print("| | at a time | median trial, s | end to next start, s | manager's CPU per trial, s |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        places[args.place](Path(folder)) as (starts, numbers, environment, changes),
    ):
        for number in [*numbers, *numbers]:  # in turn
            measure("on one machine", number, args.trials, {}, trialCommand=sleep)
            there = changes | {"trialCommand": f"{starts}{sleep}"}
            measure(f"by {args.place}", number, args.trials, environment, **there)


if __name__ == "__main__":
    main()
