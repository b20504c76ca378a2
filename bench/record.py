"""Record trainings at random places of search_space.json, in which tuners can be tried and judged.

    python bench/record.py     # 127 trainings, some 35 minutes on 2 cores

The first places are trained anew for 1 epoch and for each number of epochs in the space, the others
for one such number, drawn as well; on all but the held-out images, a thread to a training and as
many at a time as there are cores. bench/table.json gets a row for each: its hyperparameters, its
losses, its accuracy on the held-out and on the test images, in percent, and its CPU seconds. What
stands there already is kept, so a recording that was interrupted goes on.
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

    tested holds the images and the labels to test on, by the name of the row's entry.
    """
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        model, lines, costs = seeds.run(0, [*flags, "--validate"], Path(folder))
    row = {"hyperparameters": values}
    row["losses"] = [float(line.split("loss: ")[1]) for _, line in lines if " loss: " in line]
    for name, (images, labels) in tested.items():
        row[name] = 100 * train.test(model, images, labels) / len(labels)
    # Of one thread, the CPU's seconds are the clock's, whatever else the machine does meanwhile.
    return row | {"seconds": round(costs["cpu"], 2)}


def draw(space, number, seed):
    """Return so many random places of a search space, as NNI draws them."""
    tuner = RandomTuner(seed=seed)
    tuner.update_search_space(space)
    return [tuner.generate_parameters() for _ in range(number)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, default=20, help="trained for several epochs each")
    parser.add_argument("--others", type=int, default=47, help="places trained once each")
    args = parser.parse_args()
    space = json.loads((ROOT / "search_space.json").read_text())
    others = draw(space, args.others, seed=1)
    epochs = [1, *space.pop("epochs")["_value"]]  # 1: where Hyperband begins
    places = draw(space, args.places, seed=0)
    wanted = [place | {"epochs": number} for place in places for number in epochs] + others
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
