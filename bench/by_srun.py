"""Time trials that srun starts, on a SLURM cluster of two nodes on this machine.

    python bench/by_srun.py         # as root, with Debian's slurm-wlm and munge; some 10 minutes

The trials sleep, and report once a second. Before each row by srun, the same trials run without
SLURM. The last column is the CPU time of NNI's manager.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from compare import hardware
from experiment import MANAGER, ROOT, Experiment, processes_at

sys.path.append(str(ROOT / "tests" / "support"))
from cluster import Cluster

TRIAL = """python3 -c '
import time, nni
nni.get_next_parameter()
for step in range({seconds}):
    nni.report_intermediate_result(step)
    time.sleep(1)
nni.report_final_result(0)'"""


def run(command, at_a_time, trials, environment):
    """Run a search; return its trials' times, [(start, end), ...], and its manager's, in s."""
    with tempfile.TemporaryDirectory() as home:
        search = Experiment(
            ROOT / "configs" / "slurm.yml",
            Path(home),
            environment,
            searchSpace={"x": {"_type": "uniform", "_value": [0, 1]}},
            trialCommand=command,
            trialConcurrency=at_a_time,
            maxTrialNumber=trials,
            tuner={"name": "Random"},
        )
        try:
            ended = search.wait(3600)
            (manager,) = processes_at(home, MANAGER)
            spent = manager.cpu_times()
        finally:
            search.stop()
    failed = [trial["status"] for trial in ended if trial["status"] != "SUCCEEDED"]
    if failed:
        raise RuntimeError(f"{len(failed)} trials of {trials} ended {', '.join(failed)}")
    times = [(trial["startTime"] / 1000, trial["endTime"] / 1000) for trial in ended]
    return times, spent.user + spent.system


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="how long a trial sleeps")
    parser.add_argument("--trials", type=int, default=100, help="per row, more than 50")
    args = parser.parse_args()
    trial = TRIAL.format(seconds=args.seconds)
    print(f"{hardware()}\n{args.trials} trials per row; each sleeps {args.seconds} s\n")
    print("| | at a time | median trial, s | end to next start, s | manager's CPU per trial, s |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder, "slurm"))
        try:
            cluster.boot()
            environment = os.environ | cluster.environment
            for name, command, at_a_time in (
                ("on one machine", trial, 2),
                ("by srun", f"srun {trial}", 2),
                ("on one machine", trial, 50),
                ("by srun", f"srun {trial}", 50),
            ):
                times, spent = run(command, at_a_time, args.trials, environment)
                starts, ends = (sorted(column) for column in zip(*times, strict=True))
                pairs = zip(starts[at_a_time:], ends[:-at_a_time], strict=True)
                gap = mean(start - end for start, end in pairs)
                length = median(end - start for start, end in times)
                cells = [name, f"{at_a_time}", f"{length:.1f}", f"{gap:.2f}"]
                cells.append(f"{spent / args.trials:.3f}")
                print(f"| {' | '.join(cells)} |", flush=True)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
