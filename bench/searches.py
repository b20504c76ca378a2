"""Run real searches with configs/cpu.yml, by its tuner and by NNI's TPE; compare their best.

    python bench/searches.py     # 90 minutes

They run in turn, one per tuner and seed, and are stopped after --seconds. Their results go to files
in --out, which choose.py reads.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import yaml
from compare import hardware
from experiment import ROOT, SEARCH, Experiment, accuracy
from tuners import best_so_far, first

from nnisearch.shared.output import as_path
from nnisearch.shared.results import read_database

CONFIG = ROOT / "configs" / "cpu.yml"
AS_SHIPPED = {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}


def search(tuner, seconds, file):
    """Search; return [(seconds from the first trial's start to a trial's end, accuracy), ...]."""
    changes = {
        "tuner": tuner,
        "searchSpace": json.loads((ROOT / "search_space.json").read_text()),
        "maxTrialNumber": 1000,
    }
    environment = {"CIFAR10_DIR": str(ROOT / "data")} | os.environ
    with tempfile.TemporaryDirectory() as home:
        experiment = Experiment(CONFIG, Path(home), environment, SEARCH, **changes)
        try:
            time.sleep(seconds)
            trials = experiment.get("trial-jobs")
            if file:
                database = Path(home, "nni-experiments", experiment.id, "db", "nni.sqlite")
                results = read_database(database)
                ended = [trial.as_json() for trial in results["trials"] if trial.has_result]
                file.write_text(json.dumps(results | {"trials": ended}) + "\n")
        finally:
            experiment.stop()
    start = min(trial["startTime"] for trial in trials if "startTime" in trial)
    ended = [trial for trial in trials if trial["status"] == "SUCCEEDED"]
    return sorted(((trial["endTime"] - start) / 1000, accuracy(trial)) for trial in ended)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=900, help="of each search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each tuner")
    parser.add_argument("--goal", type=float, default=67.97, help="accuracy to reach, in percent")
    parser.add_argument("--out", type=as_path, metavar="FOLDER", help="write the searches there")
    args = parser.parse_args()
    shipped = yaml.safe_load(CONFIG.read_text())["tuner"]
    times = [args.seconds / 2, args.seconds]
    print(hardware())
    print("| tuner | seed | trials |", *(f"after {t:.0f} s, % |" for t in times), end="")
    print(f" trials to {args.goal} % | seconds to it |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for seed in args.seeds:
        for name, tuner in {"cpu.yml": shipped, "TPE": AS_SHIPPED}.items():
            seeded = tuner | {"classArgs": tuner["classArgs"] | {"seed": seed}}
            file = args.out and args.out / f"{name.removesuffix('.yml')}-{seed}.json"
            ended = search(seeded, args.seconds, file)
            best = " | ".join(f"{value:.2f}" for value in best_so_far(ended, times))
            trials, seconds = first(ended, args.goal)
            print(
                f"| {name} | {seed} | {len(ended)} | {best} | {trials} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
