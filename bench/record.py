"""Record trainings at random points of search_space.json, for tuners.py.

    python bench/record.py     # 127 trainings, some 35 minutes on 2 cores

The first points are trained for 1 epoch and for each number of epochs in the space, the others for
one random number of epochs. A training holds out images and uses one thread; one runs per core.
bench/table.json gets a row per training: hyperparameters, losses, accuracy in percent on the
held-out and on the test images, and CPU seconds. Rows that are there already are kept, so an
interrupted recording goes on.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import seeds
from compare import hardware
from experiment import ROOT
from nni.algorithms.hpo.random_tuner import RandomTuner

import train
from nnisearch.shared.output import write
from trial import data

TABLE = ROOT / "bench" / "table.json"


def record(values, tested):
    """Train with these hyperparameters, the seed 0 and held-out images; return the table's row.

    tested is {key of the row: (images, labels) to test on}.
    """
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        model, lines, costs = seeds.run(0, [*flags, "--validate"], Path(folder))
    row = {"hyperparameters": values}
    row["losses"] = [float(line.split("loss: ")[1]) for _, line in lines if " loss: " in line]
    for name, (images, labels) in tested.items():
        row[name] = 100 * train.test(model, images, labels) / len(labels)
    # Other processes do not change CPU seconds. With one thread they are the training's seconds.
    return row | {"seconds": round(costs["cpu"], 2)}


def draw(space, number, seed):
    """Return number random points of a search space, drawn by NNI."""
    tuner = RandomTuner(seed=seed)
    tuner.update_search_space(space)
    return [tuner.generate_parameters() for _ in range(number)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="points trained several times")
    parser.add_argument("--others", type=int, default=47, help="points trained once")
    args = parser.parse_args()
    space = json.loads((ROOT / "search_space.json").read_text())
    others = draw(space, args.others, seed=1)
    epochs = [1, *space.pop("epochs")["_value"]]  # 1: where Hyperband begins
    points = draw(space, args.points, seed=0)
    wanted = [point | {"epochs": number} for point in points for number in epochs] + others
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    recorded = [row["hyperparameters"] for row in rows]
    wanted = [values for values in wanted if values not in recorded]
    data_set = data.load_cifar10(train.parse_args([]).data_dir)
    tested = {"held_out": data.hold_out(*data_set[:2])[2:], "test": data_set[2:]}
    machine = hardware()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row in pool.map(lambda values: record(values, tested), wanted):
            rows.append(row)
            lines = ",\n".join(map(json.dumps, rows))
            write(TABLE, f'{{"hardware": "{machine}", "rows": [\n{lines}\n]}}\n'.encode())
            print(f"{len(rows)}: {row['test']:.2f} % in {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
