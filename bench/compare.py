"""Measure train.py against the tutorial's loop and against its own floor, as whole processes.

    python bench/compare.py             # 5 runs of each, some 20 minutes on 2 cores
    python bench/compare.py --quick     # 1 run of one epoch
    python bench/compare.py --processes 2      # instead: one process against two of torchrun
    python bench/compare.py --ladder    # instead: seconds to 64.28, 70, 75 and 78 %, 25 minutes
    python bench/compare.py --busy      # instead: fast.json on idle and on busy cores

The processes run in turn: if the machine becomes slower, it is slower for all. The figures are
medians. Uses a GPU if torch finds one, and CIFAR-10 from CIFAR10_DIR or data/ beside train.py.
"""

import argparse
import contextlib
import itertools
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
COMMANDS = {
    "tutorial": [sys.executable, ROOT / "bench" / "tutorial.py"],
    "train.py": TRAIN,
    "floor": [sys.executable, ROOT / "bench" / "floor.py"],
}
# {accuracy in %: flags of the fastest known training that reaches it}
LADDER = {
    64.28: ["--params", ROOT / "configs" / "params" / "fast.json"],
    70: ["--params", ROOT / "configs" / "params" / "reach70.json"],
    75: ["--params", ROOT / "configs" / "params" / "reach75.json"],
    78: ["--params", ROOT / "configs" / "params" / "reach78.json"],
}
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


def ratio(ones, others, digits=2):
    """Return the median and the range of one / other, seed by seed, as a table's cell."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    low, middle, high = (f"{f(ratios):.{digits}f}" for f in (min, median, max))
    return f"{middle} ({low} to {high})"


def ladder(runs):
    """Print the time to reach each accuracy of LADDER, and the time of the tutorial's loop."""
    commands = {"the tutorial's loop": COMMANDS["tutorial"]}
    commands |= {f"train.py for {goal} %": [*TRAIN, *flags] for goal, flags in LADDER.items()}
    figures = {name: [] for name in commands}
    for seed in range(runs):
        for name, command in commands.items():
            lines, costs = run_timed([*command, "--seed", seed])
            figures[name].append((costs["seconds"], costs["cpu"], accuracy(lines)))
    print("| | seconds | CPU seconds | accuracy % | the tutorial's seconds / these |")
    print("| --- | --- | --- | --- | --- |")
    tutorial = [seconds for seconds, _, _ in figures["the tutorial's loop"]]
    for name, rows in figures.items():
        seconds, cpu, accuracies = zip(*rows, strict=True)
        cells = [f"{median(seconds):.1f}", f"{median(cpu):.1f}", with_spread(accuracies)]
        cells.append(ratio(tutorial, seconds, digits=1))
        print(f"| {name} |", " | ".join(cells), "|")


@contextlib.contextmanager
def busy_cores():
    """Keep each core busy with a process that does nothing else, until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def busy(runs):
    """Print the seconds of fast.json on idle and on busy cores, by the way its threads wait.

    The last rows fix the number of threads; in the others, train.py chooses it.
    """
    cores = len(os.sched_getaffinity(0))
    environments = {
        "train.py": {},
        "spinning as long as libgomp does by itself": {"GOMP_SPINCOUNT": "300000"},
        "sleeping at once": {"OMP_WAIT_POLICY": "passive"},
    }
    threads = 1
    while threads <= cores:
        environments[f"threads: {threads}"] = {"OMP_NUM_THREADS": str(threads)}
        threads *= 2
    situations = {"idle": contextlib.nullcontext, "busy": busy_cores}
    seconds = {(name, situation): [] for name in environments for situation in situations}
    for seed in range(runs):
        for situation, surroundings in situations.items():
            with surroundings():
                for name, environment in environments.items():
                    command = [*TRAIN, *LADDER[64.28], "--seed", seed]
                    _, costs = run_timed(command, **environment)
                    seconds[name, situation].append(costs["seconds"])
    print(f"| | seconds, idle cores | beside {cores} busy processes |")
    print("| --- | --- | --- |")
    for name in environments:
        cells = [f"{median(seconds[name, situation]):.1f}" for situation in situations]
        print(f"| {name} |", " | ".join(cells), "|")


def hardware():
    """Return a line about the machine and the versions."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    return f"{gpu.strip() or 'no GPU'}, {cores}, {versions}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--quick", action="store_true", help="1 run of one epoch")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--processes", type=int, metavar="N", help="compare 1 process with N")
    parser.add_argument("--ladder", action="store_true", help="measure seconds to accuracies")
    parser.add_argument("--busy", action="store_true", help="measure on idle and on busy cores")
    args = parser.parse_args()
    commands = COMMANDS
    if n := args.processes:
        commands = {"1 process": TRAIN, f"{n} processes": [*TORCHRUN, n, ROOT / "train.py"]}
    names = list(commands)
    runs, epochs = (1, 1) if args.quick else (args.runs, 2)
    print(f"{hardware()}\n{runs} runs of each in turn, seeds 0 to {runs - 1}")
    if not args.ladder and not args.busy:
        print(f"{epochs} epochs")
    print("Medians; for the accuracy, mean and standard deviation\n")
    if args.ladder:
        return ladder(runs)
    if args.busy:
        return busy(runs)
    print("| batch size | |", " | ".join(heading for heading, _ in COLUMNS.values()), "|")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for batch_size in args.batch_sizes:
        figures = {name: [] for name in names}
        for seed in range(runs):
            for name, command in commands.items():
                figures[name].append(measure(command, batch_size, epochs, seed))
        for name, results in figures.items():
            columns = {key: [result[key] for result in results] for key in COLUMNS}
            cells = [form.format(median(columns[key])) for key, (_, form) in COLUMNS.items()]
            cells[-1] = "" if name == "floor" else with_spread(columns["accuracy"])
            print(f"| {batch_size} | {name} |", " | ".join(cells), "|", flush=True)
        for name, other in itertools.pairwise(names):
            cells = []
            for key in ("seconds", "cpu", "memory", "step"):
                ones, others = ([row[key] for row in figures[n]] for n in (name, other))
                cells.append(ratio(ones, others))
            print(f"| {batch_size} | {name} / {other} |", " | ".join([*cells, "", ""]), "|")


if __name__ == "__main__":
    main()
