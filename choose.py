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
import collections
import csv
import io
import itertools
import json
import math
import os
import sqlite3
import sys
from pathlib import Path

EXPERIMENTS = Path("~/nni-experiments/.experiment")  # NNI's list of them: {ID: {...}}
COLUMNS = ("trial", "id", "accuracy", "seconds", "final_loss", "area")


def read_json(path):
    """Return what the JSON file holds. Raises OSError or ValueError, naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def finite(value):
    """Return value, of JSON or text, as a finite number, or None where it is none."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def find_database(experiment):
    """Return the ID and the database of an experiment of this user, by default the latest.

    Raises ValueError if there is no such experiment, OSError if NNI's list cannot be read.
    """
    listed = EXPERIMENTS.expanduser()
    known = read_json(listed) if listed.exists() else {}
    if not known:
        raise ValueError(f"no experiment: {listed} lists none; --file reads exported results")
    if experiment is None:
        experiment = max(known, key=lambda key: known[key]["startTime"])
    if experiment not in known:
        raise ValueError(f"EXPERIMENT_ID is {experiment!r}; allowed: {', '.join(sorted(known))}")
    return experiment, Path(known[experiment]["logDir"]) / experiment / "db" / "nni.sqlite"


def read_database(experiment, path):
    """Return the search in NNI's database, in the form that --json prints.

    Raises sqlite3.Error, KeyError or TypeError if the file is no database of NNI 2.10, and
    sqlite3.Error if it stays locked for 5 seconds.
    """
    # Read-only, so that nothing is written beside NNI and a file that is missing is not created.
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        profiles = "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"
        events = (
            "SELECT timestamp, trialJobId, event, data, sequenceId FROM TrialJobEvent"
            " WHERE event NOT IN ('ADD_CUSTOMIZED', 'ADD_HYPERPARAMETER', 'IMPORT_DATA')"
            " ORDER BY rowid"
        )
        metrics = "SELECT trialJobId, type, data FROM MetricData ORDER BY sequence"
        profile = json.loads(database.execute(profiles).fetchone()[0])
        trials = {}
        for timestamp, id, event, data, number in database.execute(events):
            trial = trials.setdefault(id, {"trial": number, "id": id})
            trial["status"] = event
            if event == "WAITING":
                trial |= {"accuracy": None, "losses": []}
                trial["hyperparameters"] = json.loads(data)["parameters"]
            if event in ("WAITING", "RUNNING"):  # NNI may miss that a short trial was running
                trial["start"] = timestamp
            else:
                trial["end"] = timestamp
        for id, kind, data in database.execute(metrics):
            value = finite(json.loads(json.loads(data)))
            if kind == "FINAL":
                trials[id]["accuracy"] = value
            else:
                trials[id]["losses"].append(value)
    finally:
        database.close()
    for trial in trials.values():
        start, end = trial.pop("start"), trial.pop("end", None)
        trial["seconds"] = None if end is None else (end - start) / 1000
        measure(trial)
    return {
        "experiment": experiment,
        "name": profile["experimentName"],
        "command": profile["trialCommand"],
        "trials": list(trials.values()),
    }


def read_file(path):
    """Return the search in a file, which --json or nnictl's export has written.

    nnictl exports only the trials with a result, without durations, and the losses only with -i.
    Raises OSError or ValueError, naming the file, if it is neither.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict):
            search = {key: content[key] for key in ("experiment", "name", "command", "trials")}
        else:
            trials = [
                {
                    "trial": number,
                    "id": trial["trialJobId"],
                    "status": "SUCCEEDED",
                    "accuracy": finite(trial["value"]),
                    "losses": [finite(loss) for loss in trial.get("intermediate", [])[:-1]],
                    "hyperparameters": trial["parameter"],
                    "seconds": None,
                }
                for number, trial in enumerate(content)
            ]
            search = {"experiment": None, "name": path.name, "command": None, "trials": trials}
        for trial in search["trials"]:
            measure(trial)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results of --json or nnictl: {reason}") from error
    return search


def measure(trial):
    """Add to a trial its final loss and the area under its loss curve, over a width of 1.

    The area is the mean of the losses, because each is the mean of its part of the trial.
    """
    losses = trial["losses"]
    trial["final_loss"] = losses[-1] if losses else None
    trial["area"] = sum(losses) / len(losses) if losses and None not in losses else None


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
    """Return the lines of a table of trials, the choice marked by an asterisk."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial["hyperparameters"]))
    rows = [["", "trial", "accuracy", "seconds", "final loss", "area", *keys]]
    for trial in trials:
        row = ["*" if trial is choice else "", str(trial["trial"]), f"{trial['accuracy']:.2f}"]
        for key, digits in (("seconds", 0), ("final_loss", 3), ("area", 3)):
            row.append("-" if trial[key] is None else f"{trial[key]:.{digits}f}")
        for key in keys:
            value = trial["hyperparameters"].get(key, "-")
            row.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


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

    colour, others = "#c1272d", "#4c6a92"
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    progress, cost, curves = figure.subplots(1, 3)

    by_number = sorted(trials, key=lambda trial: trial["trial"])
    numbers = [trial["trial"] for trial in by_number]
    accuracies = [trial["accuracy"] for trial in by_number]
    progress.scatter(numbers, accuracies, s=14, color=others, alpha=0.6, label="a trial")
    best = list(itertools.accumulate(accuracies, max))
    progress.step(numbers, best, where="post", color="black", label="best so far")
    progress.xaxis.get_major_locator().set_params(integer=True)
    progress.set(xlabel="trial", ylabel="accuracy in %", title="Best so far")

    timed = [trial for trial in trials if trial["seconds"] is not None]
    seconds = [trial["seconds"] for trial in timed]
    cost.scatter(seconds, [trial["accuracy"] for trial in timed], s=14, color=others, alpha=0.6)
    cost.set(xlabel="duration in s", ylabel="accuracy in %", title="Accuracy by duration")
    for axes, key in ((progress, "trial"), (cost, "seconds")):
        if choice[key] is not None:
            star = {"marker": "*", "s": 140, "color": colour, "zorder": 3}
            label = f"the choice, trial {choice['trial']}"
            axes.scatter([choice[key]], [choice["accuracy"]], label=label, **star)
    progress.legend(loc="best", frameon=False)

    drawn = list(trials[:top])
    if choice not in drawn:
        drawn.append(choice)
    for trial in reversed(drawn):  # the best on top
        losses = trial["losses"]
        epochs = finite(trial["hyperparameters"].get("epochs")) or 1
        places = [epochs * (index + 1) / len(losses) for index in range(len(losses))]
        style = {"color": others, "alpha": 0.45, "linewidth": 1}
        if trial is choice:
            label = f"trial {trial['trial']}: {trial['accuracy']:.2f} %"
            style = {"color": colour, "zorder": 3, "linewidth": 2, "label": label}
        curves.plot(places, losses, marker="." if len(losses) == 1 else None, **style)
    curves.set(xlabel="epoch", ylabel="training loss", title=f"Losses of the top {len(drawn)}")
    curves.legend(loc="best", frameon=False)
    for axes in (progress, cost, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    latest = "if left out the one last started, resumed or viewed by this user"
    add("experiment", nargs="?", metavar="EXPERIMENT_ID", default=argparse.SUPPRESS, help=latest)
    add("--file", type=Path, help="read results from there instead: of --json or nnictl's export")
    add("--within", type=float, default=0.5, help="points of accuracy that count as equally good")
    add("--top", type=int, default=10, help="how many trials are shown")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all trials as JSON")
    output.add_argument("--csv", action="store_true", help="print the trials with a result as CSV")
    add("--out", type=Path, metavar="FILE", help="write the choice there, for train.py --params")
    add("--plot", type=Path, metavar="FILE.png", help="draw the search there, by matplotlib")
    args = parser.parse_args(argv)
    args.experiment = getattr(args, "experiment", None)
    if not 0 <= args.within < math.inf:
        parser.error(f"--within is {args.within}; allowed: a finite number >= 0")
    if args.top < 1:
        parser.error(f"--top is {args.top}; allowed: an integer >= 1")
    if args.file and args.experiment:
        parser.error(f"EXPERIMENT_ID is {args.experiment!r}; allowed: none, with --file")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.file:
            search = read_file(args.file)
        else:
            experiment, database = find_database(args.experiment)
            try:
                search = read_database(experiment, database)
            except (sqlite3.Error, KeyError, TypeError) as error:
                raise OSError(f"cannot read {database}: {error}") from error
        trials = [trial for trial in search["trials"] if has_result(trial)]
        trials.sort(key=lambda trial: (-trial["accuracy"], trial["trial"]))
        if not trials:
            raise ValueError(
                f"{search['name']}: none of {len(search['trials'])} trials has a result"
            )
        choice = choose(trials, args.within)
        if args.out:
            kept = {"experiment": search["experiment"]}
            kept |= {key: choice[key] for key in ("trial", "id", "accuracy", "hyperparameters")}
            write(args.out, json.dumps(kept, indent=4).encode() + b"\n")
        if args.plot:
            write(args.plot, plot(trials, choice, args.top))
    except ImportError as error:
        sys.exit(f"choose.py: error: --plot needs matplotlib (pip install matplotlib): {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"choose.py: error: {error}")

    if args.json:
        print(json.dumps(search | {"choice": choice["id"]}))
    elif args.csv:
        rows = [{key: trial[key] for key in COLUMNS} | trial["hyperparameters"] for trial in trials]
        keys = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(f"{search['experiment'] or args.file}: {search['name']}")
        print(*table(trials[: args.top], choice), sep="\n")
        others = collections.Counter(
            "without a result" if trial["status"] == "SUCCEEDED" else trial["status"]
            for trial in search["trials"]
            if not has_result(trial)
        )
        left_out = "; left out: " * bool(others) + ", ".join(
            f"{n} {why}" for why, n in others.items()
        )
        print(f"{len(trials)} of {len(search['trials'])} trials have a result{left_out}")
        print(
            f"* the choice, trial {choice['trial']} ({choice['id']}): within {args.within:g} points"
            " of the best accuracy the shortest, then the one whose loss fell fastest"
        )
        print(json.dumps(choice["hyperparameters"]))


if __name__ == "__main__":
    main()
