"""Record trainings at random places of search_space.json, in which tuners can be tried and judged.

    python bench/record.py --places 45      # 135 trainings, some 50 minutes on 2 cores

Each place is trained anew for each number of epochs, on all but the held-out images, a thread to a
training and as many at a time as there are cores. docs/table.json gets a row for each: what it was
given, its losses, its accuracy on the held-out and on the test images, in percent, and its seconds.
What stands there already is kept, so a recording that was interrupted goes on.
"""

import argparse
import json
import math
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import seeds
from compare import hardware
from experiment import ROOT

import cifar10
import train
from choose import write

SPACE = json.loads((ROOT / "search_space.json").read_text())
TABLE = ROOT / "docs" / "table.json"


def draw(entry, generator):
    """Return a value of a search space's entry at random."""
    values = entry["_value"]
    if entry["_type"] == "choice":
        return generator.choice(values)
    if entry["_type"] == "loguniform":
        return math.exp(generator.uniform(*map(math.log, values)))
    return generator.uniform(*values)


def record(given):
    """Train with given hyperparameters, the seed 0 and held-out images; return the table's row."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        model, lines, costs = seeds.run(0, [*flags, "--validate"], Path(folder))
    data = cifar10.load_cifar10(train.parse_args([]).data_dir)
    _, _, *held_out = cifar10.hold_out(*data[:2])
    row = {"hyperparameters": given}
    row["losses"] = [float(line.split("loss: ")[1]) for _, line in lines if " loss: " in line]
    for name, images, labels in (("held_out", *held_out), ("test", *data[2:])):
        row[name] = 100 * train.test(model, images, labels) / len(labels)
    # Of one thread, the CPU's seconds are the clock's, whatever else the machine does meanwhile.
    return row | {"seconds": round(costs["cpu"], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, default=45)
    args = parser.parse_args()
    generator = random.Random(0)
    epochs = SPACE["epochs"]["_value"]
    wanted = []
    for _ in range(args.places):
        place = {key: draw(entry, generator) for key, entry in SPACE.items() if key != "epochs"}
        wanted += [place | {"epochs": number} for number in epochs]
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []
    known = [row["hyperparameters"] for row in rows]
    wanted = [given for given in wanted if given not in known]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row in pool.map(record, wanted):
            rows.append(row)
            lines = ",\n".join(map(json.dumps, rows))
            write(TABLE, f'{{"hardware": "{hardware()}", "rows": [\n{lines}\n]}}\n'.encode())
            print(f"{len(rows)}: {row['test']:.2f} % in {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
