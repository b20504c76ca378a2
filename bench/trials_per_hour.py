"""Measure trials per hour: by nnictl, search.py and Optuna, and with several trials at a time.

    python bench/trials_per_hour.py     # some 10 minutes on 2 cores

The first table has the demo's trials by nnictl, by search.py, and by Optuna with as many workers.
The second has the best trial of the 2020 write-up, on CIFAR-10, by search.py, one and several at a
time. Trials differ only in the last digits of lr: NNI ends a search whose space is used up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from compare import hardware

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from experiment import NNICTL, ROOT, SEARCH, Experiment, accuracy

DEMO = {"batch_size": 32, "lr": 0.01, "epochs": 5, "optimizer": "SGD", "momentum": 0.9}
BEST = {"batch_size": 64, "lr": 0.014, "epochs": 10, "optimizer": "SGD", "momentum": 0.9}
DEMO_COMMAND = "OMP_NUM_THREADS=1 python3 train.py --dataset synthetic --report-every 50"
TUNER = {"codeDirectory": str(ROOT), "className": "nnisearch.tuners.OptunaTuner"}
TUNER["classArgs"] = {"sampler": "TPESampler", "seed": 0}
DIFFERENCE = 1e-6  # of the greatest and the least lr


def run_nni(config, parameters, trials, start=SEARCH, **changes):
    """Run a search by NNI; return [(start, end, accuracy), ...] of its trials, in s and %."""
    space = {key: {"_type": "choice", "_value": [value]} for key, value in parameters.items()}
    lr = parameters["lr"]
    space["lr"] = {"_type": "uniform", "_value": [lr, lr + DIFFERENCE]}
    changes |= {"searchSpace": space, "maxTrialNumber": trials, "tuner": TUNER}
    environment = os.environ | {"CIFAR10_DIR": os.environ.get("CIFAR10_DIR", f"{ROOT}/data")}
    with tempfile.TemporaryDirectory() as home:
        experiment = Experiment(ROOT / config, Path(home), environment, start, **changes)
        try:
            ended = experiment.wait(3600)
        finally:
            experiment.stop()
    failed = [trial["status"] for trial in ended if trial["status"] != "SUCCEEDED"]
    if failed:
        raise RuntimeError(f"{len(failed)} trials of {trials} ended {', '.join(failed)}")
    return [(t["startTime"] / 1000, t["endTime"] / 1000, accuracy(t)) for t in ended]


def run_optuna(command, parameters, trials, workers):
    """Run the trial command by Optuna; return what run_nni() does."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []

    def objective(trial):
        lr = trial.suggest_float("lr", parameters["lr"], parameters["lr"] + DIFFERENCE)
        values = parameters | {"lr": lr}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        start = time.time()
        line = f"{command} {' '.join(flags)}"
        printed = subprocess.run(line, shell=True, cwd=ROOT, check=True, capture_output=True).stdout
        percent = float(printed.split(b"Acc: ")[1].split(b"%")[0])
        rows.append((start, time.time(), percent))
        return percent

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials, n_jobs=workers)
    return rows


def print_row(name, rows, workers):
    """Print the table's row for trials that this number of workers ran."""
    starts, ends, accuracies = (sorted(column) for column in zip(*rows, strict=True))
    gaps = [start - end for start, end in zip(starts[workers:], ends[:-workers], strict=True)]
    seconds = [end - start for start, end, _ in rows]
    span = ends[-1] - starts[0]
    cells = [
        f"{len(rows) / span * 3600:.0f}",
        f"{median(seconds):.1f}",
        f"{mean(gaps):.2f}",
        f"{100 * sum(seconds) / span / workers:.0f}",
        f"{mean(accuracies):.2f}",
    ]
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


def print_head(parameters, trials):
    """Print the head of a table of trials with these hyperparameters."""
    print(f"\n{trials} trials per row: {json.dumps(parameters)}\n")
    print("| | trials per hour | median trial, s | end to next start, s | busy % | accuracy % |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo-trials", type=int, default=12, help="per row of the first table")
    parser.add_argument("--trials", type=int, default=4, help="per row of the second")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    print(hardware())

    if trials := args.demo_trials:
        print_head(DEMO, trials)
        at_once = {"trialConcurrency": cores, "trialCommand": DEMO_COMMAND}
        for name, start in (("nnictl", NNICTL), ("search.py", SEARCH)):
            print_row(name, run_nni("configs/demo.yml", DEMO, trials, start, **at_once), cores)
        print_row("Optuna", run_optuna(DEMO_COMMAND, DEMO, trials, cores), cores)

    if args.trials:
        print_head(BEST, args.trials)
        for n in (1, cores):
            command = f"OMP_NUM_THREADS={cores // n} python3 train.py"
            changes = {"trialConcurrency": n, "trialCommand": command}
            rows = run_nni("configs/cpu.yml", BEST, args.trials, **changes)
            print_row(f"{n} at a time, {cores // n} threads each", rows, n)


if __name__ == "__main__":
    main()
