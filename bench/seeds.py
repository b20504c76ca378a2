"""Train with several seeds and print the test accuracy's mean and deviation, plain and with --tta.

    python bench/seeds.py                                # the baseline, seeds 0 to 4
    python bench/seeds.py --params configs/params/fast.json     # flags of train.py

Without a GPU, one seed runs per core, each with one thread. On a GPU, one runs at a time.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from compare import ROOT, TRAIN, hardware, run_timed, with_spread

sys.path.append(str(ROOT))

import train
from trial import data


def run(seed, flags, folder):
    """Train with this seed; return the trained model, and the run's costs, as run_timed() does."""
    path = folder / f"{seed}.pt"
    # Without NNI's warning that no experiment is running.
    environment = {"PYTHONWARNINGS": "ignore::RuntimeWarning"}
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"
    command = [*TRAIN, *flags, "--seed", seed, "--save", path]
    _, costs = run_timed(command, **environment)
    model = train.Net()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model, costs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="seeds 0 to RUNS - 1")
    args, flags = parser.parse_known_args()
    settings = train.parse_args(flags)
    images, labels = data.load_cifar10(settings.data_dir)[2:]
    at_a_time = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    print(f"{hardware()}, {at_a_time} at a time")
    print(json.dumps({key: getattr(settings, key) for key in train.HYPERPARAMETERS}))
    print("| seed | test accuracy % | with --tta % | seconds | CPU seconds |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_a_time) as pool:
        runs = pool.map(lambda seed: run(seed, flags, Path(folder)), range(args.runs))
        for seed, (model, costs) in enumerate(runs):
            correct = [train.test(model, images, labels, tta) for tta in (False, True)]
            plain, tta = (100 * number / len(labels) for number in correct)
            wall, cpu = costs["seconds"], costs["cpu"]
            rows.append((plain, tta, wall, cpu))
            print(f"| {seed} | {plain:.2f} | {tta:.2f} | {wall:.0f} | {cpu:.0f} |", flush=True)
    plain, tta, wall, cpu = zip(*rows, strict=True)
    medians = f"{median(wall):.0f} | {median(cpu):.0f}"
    print(f"| mean, median | {with_spread(plain)} | {with_spread(tta)} | {medians} |")


if __name__ == "__main__":
    main()
