"""Measure how many trials an hour a search makes, by how many run at a time.

    python bench/trials_per_hour.py     # 4 trials a row, some 6 minutes on 2 cores

Every trial is the write-up's best but for the last digits of lr (NNI ends a search whose space is
used up), so that the rows differ in nothing else. On a GPU, which the trials of a row share, the
search is config.yml's; without one it is that of configs/cpu.yml.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from compare import hardware
from experiment import ROOT, Experiment, accuracy

BEST = {"batch_size": 64, "lr": 0.014, "epochs": 10, "optimizer": "SGD", "momentum": 0.9}


def measure(config, home, trials, changes):
    """Return trials per hour, seconds of the median trial and the mean accuracy of a search."""
    space = {key: {"_type": "choice", "_value": [value]} for key, value in BEST.items()}
    space["lr"] = {"_type": "uniform", "_value": [BEST["lr"], BEST["lr"] + 1e-6]}
    environment = dict(os.environ) | {"CIFAR10_DIR": os.environ.get("CIFAR10_DIR", f"{ROOT}/data")}
    changes = changes | {"searchSpace": space, "maxTrialNumber": trials}
    experiment = Experiment(ROOT / config, home, environment, **changes)
    try:
        ended = experiment.wait(3600)
    finally:
        experiment.stop()
    failed = [trial["status"] for trial in ended if trial["status"] != "SUCCEEDED"]
    if failed:
        raise RuntimeError(f"{len(failed)} trials of {trials} ended {', '.join(failed)}")
    starts, ends = ([trial[key] for trial in ended] for key in ("startTime", "endTime"))  # ms
    accuracies = [accuracy(trial) for trial in ended]
    durations = sorted(end - start for start, end in zip(starts, ends, strict=True))
    per_hour = trials / (max(ends) - min(starts)) * 3.6e6
    return per_hour, durations[trials // 2] / 1000, sum(accuracies) / trials


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4, help="in each row")
    args = parser.parse_args()
    gpu = shutil.which("nvidia-smi") is not None
    rows = []
    if gpu:
        service = {"platform": "local", "useActiveGpu": False}
        for n in (1, 2, 4):
            changes = {"trialConcurrency": n}
            changes["trainingService"] = service | {"maxTrialNumberPerGpu": n, "gpuIndices": [0]}
            rows.append((f"{n} at a time on one GPU", changes))
    else:
        cores = len(os.sched_getaffinity(0))
        command = "OMP_NUM_THREADS={} python3 train.py"
        for n in (1, cores):
            changes = {"trialConcurrency": n, "trialCommand": command.format(cores // n)}
            rows.append((f"{n} at a time, {cores // n} threads each", changes))
    print(f"{hardware()}\n{args.trials} trials a row: {json.dumps(BEST)}\n")
    print("| | trials per hour | seconds of the median trial | mean accuracy % |")
    print("| --- | --- | --- | --- |")
    for name, changes in rows:
        with tempfile.TemporaryDirectory() as home:
            config = "config.yml" if gpu else "configs/cpu.yml"
            per_hour, seconds, percent = measure(config, Path(home), args.trials, changes)
        print(f"| {name} | {per_hour:.0f} | {seconds:.0f} | {percent:.2f} |", flush=True)


if __name__ == "__main__":
    main()
