"""Measure train.py against the tutorial's loop, as whole processes.

    python bench/compare.py                    # 5 runs of each, some 15 minutes on 2 cores
    python bench/compare.py --processes 2      # instead: one process against two of torchrun

The processes run in turn: if the machine becomes slower, it is slower for all. The figures are
medians. Uses a GPU if torch finds one, and CIFAR-10 from CIFAR10_DIR or data/ beside train.py.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, ROOT / "train.py"]
TUTORIAL = [sys.executable, ROOT / "bench" / "tutorial.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
COLUMNS = {  # key: (heading, format)
    "seconds": ("seconds", "{:.1f}"),
    "cpu": ("CPU seconds", "{:.1f}"),
    "memory": ("peak MiB", "{:.0f}"),
    "step": ("µs per step", "{:.0f}"),
    "start": ("start-up s", "{:.1f}"),
    "accuracy": ("accuracy %", "{:.2f}"),
}


def run_timed(command, **environment):
    """Run a command; return what it printed, [(seconds since its start, line), ...], and its costs.

    The costs are seconds, CPU seconds of all its processes, and the largest one's peak in MiB.
    Raises RuntimeError, with its stderr, if it fails.
    """
    with tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        lines = [(time.monotonic() - start, line) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            errors.seek(0)
            raise RuntimeError(f"{process.args} ended with status {status}:\n{errors.read()}")
    cpu = usage.ru_utime + usage.ru_stime
    return lines, {"seconds": seconds, "cpu": cpu, "memory": usage.ru_maxrss / 1024}


def measure(command, batch_size, epochs, seed):
    """Run command and return its figures, a dict with the keys of COLUMNS.

    A step's time is measured between the first and the last printed loss. The start-up is the time
    before the first step. Both are NaN if only one loss is printed.
    """
    flags = [f"--batch-size={batch_size}", f"--epochs={epochs}", f"--seed={seed}"]
    lines, costs = run_timed([*command, *flags])
    losses = []  # for each loss: seconds and steps at its print
    for seconds, line in lines:
        if printed := re.match(r"\[(\d+), +(\d+)\] loss", line):
            epoch, number = map(int, printed.groups())
            losses.append((seconds, (epoch - 1) * -(-50_000 // batch_size) + number))
    (first_time, first), (last_time, last) = losses[0], losses[-1]
    step = (last_time - first_time) / (last - first) if last > first else float("nan")
    start = first_time - first * step
    return costs | {"step": step * 1e6, "start": start, "accuracy": accuracy(lines)}


def accuracy(lines):
    """Return the accuracy that a training has printed at its end, in percent."""
    return float(lines[-1][1].removeprefix("Acc: ").split("%")[0])


def with_spread(accuracies):
    """Return the mean of accuracies, and the standard deviation of several, as a table's cell."""
    spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{mean(accuracies):.2f}{spread}"


def ratio(ones, others):
    """Return the median and the range of one / other, seed by seed, as a table's cell."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def hardware():
    """Return a line about the machine and the versions."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    return f"{gpu.strip() or 'no GPU'}, {cores}, {versions}"


def compare(commands, batch_sizes, runs, epochs=2):
    """Print the figures of two commands, {name: command}, and their ratios."""
    print(f"{epochs} epochs; medians; for the accuracy, mean and standard deviation\n")
    print("| batch size | |", " | ".join(heading for heading, _ in COLUMNS.values()), "|")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for batch_size in batch_sizes:
        figures = {name: [] for name in commands}
        for seed in range(runs):
            for name, command in commands.items():
                figures[name].append(measure(command, batch_size, epochs, seed))
        for name, rows in figures.items():
            columns = {key: [row[key] for row in rows] for key in COLUMNS}
            cells = [form.format(median(columns[key])) for key, (_, form) in COLUMNS.items()]
            cells[-1] = with_spread(columns["accuracy"])
            print(f"| {batch_size} | {name} |", " | ".join(cells), "|", flush=True)
        first, second = figures.values()
        cells = [
            ratio([row[key] for row in first], [row[key] for row in second])
            for key in ("seconds", "cpu", "memory", "step")
        ]
        print(f"| {batch_size} | {' / '.join(commands)} |", " | ".join([*cells, "", ""]), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--processes", type=int, metavar="N", help="compare 1 process with N")
    args = parser.parse_args()
    print(f"{hardware()}\n{args.runs} runs of each in turn, seeds 0 to {args.runs - 1}")
    commands = {"tutorial": TUTORIAL, "train.py": TRAIN}
    if n := args.processes:
        commands = {"1 process": TRAIN, f"{n} processes": [*TORCHRUN, n, ROOT / "train.py"]}
    compare(commands, args.batch_sizes, args.runs)


if __name__ == "__main__":
    main()
