"""Measure trials per hour: by nnictl, search.py and Optuna, and with several trials at a time.

    python bench/trials_per_hour.py     # some 16 minutes on 2 cores

The first table has the demo's trials by nnictl, by search.py, and by Optuna with as many workers.
The second has such trials with GPSampler, a tuner that needs time to compute. The third has the
best trial of the 2020 write-up, on CIFAR-10, by search.py, one and several at a time. In the first
and the third table, trials differ only in the last digits of lr: NNI ends a search whose space is
used up.
"""

import argparse
import json
import os
import shutil
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
# For GPSampler: as many dimensions as the demo has; none changes a trial's time.
SPACE = {key: {"_type": "choice", "_value": [DEMO[key]]} for key in ("batch_size", "epochs")} | {
    "lr": {"_type": "loguniform", "_value": [0.001, 0.1]},
    "lr_schedule": {"_type": "choice", "_value": ["constant", "cosine"]},
    "momentum": {"_type": "uniform", "_value": [0.5, 0.95]},
    "weight_decay": {"_type": "uniform", "_value": [0, 0.001]},
    "label_smoothing": {"_type": "uniform", "_value": [0, 0.2]},
}
SAMPLERS = {"TPESampler": {}, "GPSampler": {"n_startup_trials": 4}}  # and their arguments
SUGGEST = {  # {type of a parameter: how Optuna draws it}
    "choice": lambda trial, key, values: trial.suggest_categorical(key, values),
    "uniform": lambda trial, key, values: trial.suggest_float(key, *values),
    "loguniform": lambda trial, key, values: trial.suggest_float(key, *values, log=True),
}
DEMO_COMMAND = "OMP_NUM_THREADS=1 python3 train.py --dataset synthetic --report-every 50"
# An nvidia-smi with as many GPUs as there are workers, each busy while a trial runs on it.
NVIDIA_SMI = r"""#!/bin/bash
busy=" $(cat $(pgrep -f '^python3 train.py --dataset synthetic' | sed 's|.*|/proc/&/environ|') \
    /dev/null 2> /dev/null | tr '\0' '\n' | sed -n 's/^CUDA_VISIBLE_DEVICES=//p' | tr '\n' ' ')"
echo "<nvidia_smi_log>"
for gpu in $(seq 0 $(({} - 1))); do
    [[ $busy == *" $gpu "* ]] && process="<process_info><pid>1</pid></process_info>" || process=""
    echo "<gpu><processes>$process</processes><utilization><gpu_util>0 %</gpu_util>"
    echo "<memory_util>0 %</memory_util></utilization></gpu>"
done
echo "</nvidia_smi_log>"
"""


def around(parameters):
    """Return a search space of only these values, except that lr's last digits vary."""
    space = {key: {"_type": "choice", "_value": [value]} for key, value in parameters.items()}
    space["lr"] = {"_type": "uniform", "_value": [parameters["lr"], parameters["lr"] + 1e-6]}
    return space


def run_nni(config, space, trials, sampler, start=SEARCH, gpus=0, **changes):
    """Run a search by NNI; return [(start, end, accuracy), ...] of its trials, in s and %."""
    arguments = {"sampler": sampler, "sampler_args": SAMPLERS[sampler], "seed": 0}
    tuner = {"className": "nnisearch.tuners.OptunaTuner", "classArgs": arguments}
    environment = dict(os.environ) | {"CIFAR10_DIR": os.environ.get("CIFAR10_DIR", f"{ROOT}/data")}
    changes |= {"searchSpace": space, "maxTrialNumber": trials}
    changes["tuner"] = tuner | {"codeDirectory": str(ROOT)}
    with tempfile.TemporaryDirectory() as home:
        if gpus:
            stand_in = Path(home, "nvidia-smi")
            stand_in.write_text(NVIDIA_SMI.format(gpus))
            stand_in.chmod(0o755)
            service = {"platform": "local", "useActiveGpu": False}
            changes |= {"trialGpuNumber": 1, "trainingService": service}
        experiment = Experiment(ROOT / config, Path(home), environment, start, **changes)
        try:
            ended = experiment.wait(3600)
        finally:
            experiment.stop()
    failed = [trial["status"] for trial in ended if trial["status"] != "SUCCEEDED"]
    if failed:
        raise RuntimeError(f"{len(failed)} trials of {trials} ended {', '.join(failed)}")
    return [(t["startTime"] / 1000, t["endTime"] / 1000, accuracy(t)) for t in ended]


def run_optuna(command, space, trials, sampler, workers):
    """Run the trial command by Optuna; return what run_nni() does."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []

    def objective(trial):
        given = {
            key: SUGGEST[entry["_type"]](trial, key, entry["_value"])
            for key, entry in space.items()
        }
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        start = time.time()
        printed = subprocess.run(
            f"{command} {' '.join(flags)}",
            shell=True,
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
        percent = float(printed.split("Acc: ")[1].split("%")[0])
        rows.append((start, time.time(), percent))
        return percent

    sampler = getattr(optuna.samplers, sampler)(seed=0, **SAMPLERS[sampler])
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials, n_jobs=workers)
    return rows


def row(name, rows, workers):
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


def head(what, trials):
    """Print a table's head; what is the parameters or the search space of the trials."""
    print(f"\n{trials} trials per row: {json.dumps(what)}\n")
    print("| | trials per hour | median trial, s | end to next start, s | busy % | accuracy % |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo-trials", type=int, default=12, help="per row of the first table")
    parser.add_argument("--trials", type=int, default=4, help="per row of the third")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    print(hardware())

    if args.demo_trials:
        head(DEMO, args.demo_trials)
        demo = ("configs/demo.yml", around(DEMO), args.demo_trials, "TPESampler")
        at_once = {"trialConcurrency": cores, "trialCommand": DEMO_COMMAND}
        row("nnictl", run_nni(*demo, start=NNICTL, **at_once), cores)
        row("search.py", run_nni(*demo, **at_once), cores)
        row("Optuna", run_optuna(DEMO_COMMAND, *demo[1:], cores), cores)
        on_cpu = at_once | {"trialCommand": f"{DEMO_COMMAND} --device cpu"}
        for name, start in (("nnictl", NNICTL), ("search.py", SEARCH)):
            rows = run_nni(*demo, start=start, gpus=cores, **on_cpu)
            row(f"{name}, scheduling {cores} GPUs of a stand-in nvidia-smi", rows, cores)
        head(SPACE, 2 * args.demo_trials)
        demo = ("configs/demo.yml", SPACE, 2 * args.demo_trials, "GPSampler")
        row("search.py, GPSampler", run_nni(*demo, **at_once), cores)
        row("Optuna, GPSampler", run_optuna(DEMO_COMMAND, *demo[1:], cores), cores)

    if args.trials:
        head(BEST, args.trials)
        for n in (1, 2, 4) if shutil.which("nvidia-smi") else (1, cores):
            changes = {"trialConcurrency": n}
            if shutil.which("nvidia-smi"):
                service = {"platform": "local", "useActiveGpu": False, "gpuIndices": [0]}
                changes["trainingService"] = service | {"maxTrialNumberPerGpu": n}
                name, config = f"{n} at a time on one GPU", "config.yml"
            else:
                changes["trialCommand"] = f"OMP_NUM_THREADS={cores // n} python3 train.py"
                name, config = f"{n} at a time, {cores // n} threads each", "configs/cpu.yml"
            row(name, run_nni(config, around(BEST), args.trials, "TPESampler", **changes), n)


if __name__ == "__main__":
    main()
