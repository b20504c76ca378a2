"""Run a search of many very short trials and check that nothing is lost, mixed up or left behind.

    python bench/soak.py            # 300 trials, four at a time, some 26 minutes on 2 cores

Every trial's parameters, as NNI lists them, are compared with those that the trial has printed.
"""

import argparse
import os
import tempfile
from pathlib import Path

from compare import hardware
from experiment import ROOT, Experiment, parameters, printed_parameters, processes_at

SPACE = {
    "batch_size": {"_type": "randint", "_value": [2000, 10_000]},
    "lr": {"_type": "loguniform", "_value": [0.001, 0.1]},
    "epochs": {"_type": "choice", "_value": [1]},
    "momentum": {"_type": "uniform", "_value": [0.5, 0.95]},
}


def costs(home):
    """Return the memory in MiB and the CPU seconds of NNI's manager (node) and dispatcher (nni)."""
    found = {}
    for process in processes_at(home):
        command = " ".join(process.cmdline())
        for name, part in (("manager", "nni_node/main.js"), ("dispatcher", "-m nni --exp_params")):
            if part in command and not command.startswith("/bin/sh"):
                times = process.cpu_times()
                found[name] = process.memory_info().rss / 2**20, times.user + times.system
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    args = parser.parse_args()
    here = set(ROOT.rglob("*"))
    print(f"{hardware()}\n{args.trials} trials, four at a time")
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        search = Experiment(
            ROOT / "configs" / "demo.yml",
            home,
            dict(os.environ),
            searchSpace=SPACE,
            maxTrialNumber=args.trials,
            trialConcurrency=4,
        )
        try:
            search.wait_for(lambda trials: sum("endTime" in t for t in trials) >= 4, 300)
            before = costs(home)
            trials = search.wait(60 * args.trials)
            after = costs(home)
            faults = [t["trialJobId"] for t in trials if t["status"] != "SUCCEEDED"]
            print(f"trials that did not succeed: {faults}")
            mixed_up = []
            for trial in trials:
                used = printed_parameters(search.trial_file(trial, "trial.log"))
                if used != used | parameters(trial):
                    mixed_up.append(trial["trialJobId"])
            print(f"trials with other parameters than NNI lists: {mixed_up}")
            different = {text for trial in trials for text in trial["hyperParameters"]}
            print(f"{len(trials)} trials, {len(different)} different sets of parameters")
            seconds = (max(t["endTime"] for t in trials) - trials[0]["startTime"]) / 1000
            print(f"{seconds:.0f} s, {3600 * len(trials) / seconds:.0f} trials per hour")
            for name, (size, _) in before.items():
                sizes = f"{size:.0f} MiB after 4 trials, {after[name][0]:.0f} at the end"
                print(f"{name}: {sizes}, {after[name][1]:.0f} s of CPU")
        finally:
            left = search.stop()
        print(f"processes left: {left}")
        print(f"files left in the project: {sorted(map(str, set(ROOT.rglob('*')) - here))}")


if __name__ == "__main__":
    main()
