"""Choose the trial to keep from a search with NNI: accurate first, then short, then fast to learn.

    python choose.py                            # the latest experiment on this machine
    python choose.py ID --out best.json         # its choice, ready for train.py --params
    python choose.py --file docs/wide.json      # what --json, or nnictl's export, has written

Of the trials whose accuracy is within --within points of the best the choice is the one that ran
shortest, in whole seconds, and of several such the one whose loss fell fastest, which is the one
with the least area under its loss curve. The experiment may be running, stopped or finished: what
is read is the database that NNI keeps of it.
"""

import argparse
import io
import json
import math
import os
import sys
from pathlib import Path

import pandas

from nnisearch.results import find_database, finite, read_database, read_file


def has_result(trial):
    """Return whether a trial counts: it has ended by itself and reported an accuracy."""
    return trial["status"] == "SUCCEEDED" and trial["accuracy"] is not None


def choose(trials, within):
    """Return the trial to keep of trials with a result, by the rule at the top of this file."""
    best = max(trial["accuracy"] for trial in trials)
    good = [trial for trial in trials if best - trial["accuracy"] <= within + 1e-9]

    def cost(trial):
        seconds = math.inf if trial["seconds"] is None else round(trial["seconds"])
        area = math.inf if trial["area"] is None else trial["area"]
        return seconds, area, -trial["accuracy"], trial["trial"]

    return min(good, key=cost)


def table(trials, choice):
    """Return a table of trials as text, the choice marked by an asterisk."""
    rows = pandas.DataFrame([trial["hyperparameters"] for trial in trials], dtype=object)
    rows = rows.fillna("-").map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    for key, digits in (("area", 3), ("final_loss", 3), ("seconds", 0), ("accuracy", 2)):
        column = ["-" if trial[key] is None else f"{trial[key]:.{digits}f}" for trial in trials]
        rows.insert(0, key.replace("_", " "), column)
    rows.insert(0, "trial", [trial["trial"] for trial in trials])
    rows.insert(0, "", ["*" if trial is choice else "" for trial in trials])
    return rows.to_string(index=False)


def write(path, content):
    """Write bytes to the file, whole or not at all. Raises OSError, naming the file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def plot(trials, choice, top):
    """Return a PNG of the search: the best so far, accuracy by duration, the top trials' losses.

    trials are ranked, and top is how many of them get their loss curve drawn. Raises ImportError
    without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    progress, cost, curves = figure.subplots(1, 3)
    rows = pandas.DataFrame(trials).sort_values("trial")
    label = f"the choice, trial {choice['trial']}: {choice['accuracy']:.2f} %"
    progress.step(rows["trial"], rows["accuracy"].cummax(), "k", where="post", label="best so far")
    for axes, key in ((progress, "trial"), (cost, "seconds")):
        axes.scatter(rows[key].astype(float), rows["accuracy"], s=14, c="#4c6a92", alpha=0.6)
        if choice[key] is not None:
            axes.scatter(
                choice[key], choice["accuracy"], 140, "#c1272d", marker="*", zorder=3, label=label
            )
    progress.set(xlabel="trial", ylabel="accuracy in %", title="Best so far")
    cost.set(xlabel="duration in s", ylabel="accuracy in %", title="Accuracy by duration")

    drawn = [trial for trial in trials[:top] if trial is not choice]
    for trial in [*reversed(drawn), choice]:  # the best on top
        losses = trial["losses"]
        epochs = finite(trial["hyperparameters"].get("epochs")) or 1
        places = [epochs * (number + 1) / len(losses) for number in range(len(losses))]
        chosen = {"color": "#c1272d", "linewidth": 2, "label": label}
        style = chosen if trial is choice else {"color": "#4c6a92", "alpha": 0.45, "linewidth": 1}
        curves.plot(places, losses, marker="." if len(losses) == 1 else None, **style)
    title = f"Losses of the top {len(drawn) + 1}"
    curves.set(xlabel="epoch", ylabel="training loss", title=title)
    for axes in (progress, cost, curves):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def parse_args(argv, prog, within):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
        prog=prog,
    )
    add = parser.add_argument
    latest = "default: the one last started, resumed or viewed by this user"
    add("experiment", nargs="?", metavar="EXPERIMENT_ID", help=latest)
    add("--file", type=Path, help="read results from there instead: of --json or nnictl's export")
    add(
        "--within",
        type=float,
        default=within,
        help="points that count as equally good (%(default)s)",
    )
    add("--top", type=int, default=10, help="how many trials are shown (%(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all trials as JSON")
    output.add_argument("--csv", action="store_true", help="print the trials with a result as CSV")
    add("--out", type=Path, metavar="FILE", help="write the choice there, for train.py --params")
    add("--plot", type=Path, metavar="FILE.png", help="draw the search there, by matplotlib")
    args = parser.parse_args(argv)
    if not 0 <= args.within < math.inf:
        parser.error(f"--within is {args.within}; allowed: a finite number >= 0")
    if args.top < 1:
        parser.error(f"--top is {args.top}; allowed: an integer >= 1")
    if args.file and args.experiment:
        parser.error(f"EXPERIMENT_ID is {args.experiment!r}; allowed: none, with --file")
    return args


def main(argv=None, prog="nnichoose", within=0.0):
    args = parse_args(argv, prog, within)
    try:
        if args.file:
            search = read_file(args.file)
        else:
            search = read_database(*find_database(args.experiment))
        everything = search["trials"]
        trials = [trial for trial in everything if has_result(trial)]
        trials.sort(key=lambda trial: (-trial["accuracy"], trial["trial"]))
        if not trials:
            raise ValueError(f"{search['name']}: none of {len(everything)} trials has a result")
        choice = choose(trials, args.within)
        if args.out:
            kept = {"experiment": search["experiment"]}
            kept |= {key: choice[key] for key in ("trial", "id", "accuracy", "hyperparameters")}
            write(args.out, json.dumps(kept, indent=4).encode() + b"\n")
        if args.plot:
            write(args.plot, plot(trials, choice, args.top))
    except ImportError as error:
        sys.exit(f"{prog}: error: --plot needs matplotlib (pip install matplotlib): {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"{prog}: error: {error}")

    if args.json:
        print(json.dumps(search | {"choice": choice["id"]}))
    elif args.csv:
        columns = ["trial", "id", "accuracy", "seconds", "final_loss", "area"]
        rows = [{key: trial[key] for key in columns} | trial["hyperparameters"] for trial in trials]
        print(pandas.DataFrame(rows, dtype=object).to_csv(index=False), end="")
    else:
        print(f"{search['experiment'] or args.file}: {search['name']}")
        print(table(trials[: args.top], choice))
        others = [trial for trial in everything if not has_result(trial)]
        states = pandas.Series([trial["status"] for trial in others], dtype=str)
        counts = states.replace("SUCCEEDED", "without a result").value_counts(sort=False)
        left_out = ", ".join(f"{count} {state}" for state, count in counts.items())
        left_out = f"; left out: {left_out}" if left_out else ""
        print(f"{len(trials)} of {len(everything)} trials have a result{left_out}")
        print(
            f"* the choice, trial {choice['trial']} ({choice['id']}): within {args.within:g} points"
            " of the best accuracy the shortest, then the one whose loss fell fastest"
        )
        print(json.dumps(choice["hyperparameters"]))


if __name__ == "__main__":
    main()
