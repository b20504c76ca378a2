"""Run a search of many very short trials; show what is lost, and whether trials become slower.

    python bench/soak.py            # 1,000 trials, four at a time, some 8 minutes on 2 cores

Compares the parameters that NNI lists with those that each trial has printed. For the first and the
last hundred trials, it prints the costs of NNI's manager, the tuner, and search.py, which watches.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import hardware
from experiment import ROOT, SEARCH, Experiment, parameters, printed_parameters, processes_at

PART = 100  # trials whose cost is compared
SPACE = {
    "size": {"_type": "randint", "_value": [2000, 10_000]},
    "rate": {"_type": "loguniform", "_value": [0.001, 0.1]},
    "name": {"_type": "choice", "_value": ["one", "two", None]},
    "share": {"_type": "uniform", "_value": [0.5, 0.95]},
}
TRIAL = """python3 -c '
import json, nni
given = nni.get_next_parameter()
print("Hyperparameters:", json.dumps(given))
for step in range(10):
    nni.report_intermediate_result(given["share"] * step)
nni.report_final_result(given["share"])'"""
NAMES = {"nni_node/main.js": "manager", "manager/dispatcher.py": "tuner", "--resume": "search.py"}


def costs(home):
    """Return {name: (memory in MiB, CPU seconds)} of the search's processes."""
    found = {}
    for process in processes_at(home):
        command = " ".join(process.cmdline())
        for part, name in NAMES.items():
            if part in command:
                times = process.cpu_times()
                found[name] = process.memory_info().rss / 2**20, times.user + times.system
    return found


def costs_when(search, number, watcher):
    """Wait until this number of trials has started; return the costs then.

    Counts the trials' folders, since NNI would list all trials each time.
    """
    folder = search.home / "nni-experiments" / search.id / "trials"
    while not folder.exists() or len(list(folder.iterdir())) < number:
        if watcher.poll() is not None:
            said = Path(search.home, "watched").read_text()[-500:]
            raise RuntimeError(f"search.py has ended before trial {number} has started: {said}")
        time.sleep(0.2)
    return costs(search.home)


def report_costs(before, after, trials):
    """Print what trials have cost, given the costs before and after them."""
    for name, (size, seconds) in after.items():
        spent = (seconds - before[name][1]) / trials
        print(f"  {name}: {size:.0f} MiB, {spent:.3f} s of CPU per trial")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="300 or more")
    args = parser.parse_args()
    here = set(ROOT.rglob("*"))
    print(f"{hardware()}\n{args.trials} trials, four at a time", flush=True)
    with tempfile.TemporaryDirectory() as home:
        search = Experiment(
            ROOT / "configs" / "demo.yml",
            Path(home),
            dict(os.environ),
            searchSpace=SPACE,
            trialCommand=TRIAL,
            maxTrialNumber=args.trials,
            trialConcurrency=4,
            tuner={"name": "Random"},
        )
        watch = [sys.executable, *SEARCH, "--resume", search.id]
        with Path(home, "watched").open("w") as said:
            watcher = subprocess.Popen(
                watch, env=search.environment, stdout=said, stderr=said, cwd=home
            )
        try:
            # Without the first and the last 20 trials, during which search.py starts and ends.
            numbers = (20, 20 + PART, args.trials - 20 - PART, args.trials - 20)
            first, second, third, fourth = (costs_when(search, n, watcher) for n in numbers)
            trials = search.wait(600)
            print(f"search.py has ended with {watcher.wait(600)}")
            ends = sorted(trial["endTime"] / 1000 for trial in trials)
            for name, at, before, after in (
                ("first", numbers[0], first, second),
                ("last", numbers[2], third, fourth),
            ):
                rate = 3600 * PART / (ends[at + PART] - ends[at])
                print(f"the {name} {PART}: {rate:.0f} trials per hour")
                report_costs(before, after, PART)
            faults = [t["trialJobId"] for t in trials if t["status"] != "SUCCEEDED"]
            print(f"trials that did not succeed: {faults}")
            mixed_up = []
            for trial in trials:
                used = printed_parameters(search.trial_file(trial, "trial.log"))
                if used != parameters(trial):
                    mixed_up.append(trial["trialJobId"])
            print(f"trials with other parameters than NNI lists: {mixed_up}")
            different = {text for trial in trials for text in trial["hyperParameters"]}
            print(f"{len(trials)} trials, {len(different)} different sets of parameters")
            short = [
                trial["trialJobId"]
                for trial in trials
                if len(search.get(f"metric-data/{trial['trialJobId']}")) != 11
            ]
            print(f"trials that lack one of their 11 reports: {short}")
            seconds = ends[-1] - min(trial["startTime"] for trial in trials) / 1000
            print(f"{seconds:.0f} s, {3600 * len(trials) / seconds:.0f} trials per hour")
        finally:
            watcher.kill()
            left = search.stop()
        print(f"processes left: {left}")
        print(f"files left in the project: {sorted(map(str, set(ROOT.rglob('*')) - here))}")


if __name__ == "__main__":
    main()
