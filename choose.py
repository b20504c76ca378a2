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
import sqlite3
import sys
from pathlib import Path

import pandas

EXPERIMENTS = Path("~/nni-experiments/.experiment")  # NNI's list of them: {ID: {...}}
EVENTS = (
    "SELECT trialJobId AS id, sequenceId, event, timestamp, data FROM TrialJobEvent WHERE event"
    " NOT IN ('ADD_CUSTOMIZED', 'ADD_HYPERPARAMETER', 'IMPORT_DATA') ORDER BY rowid"
)
METRICS = "SELECT trialJobId AS id, type, data FROM MetricData ORDER BY sequence"
PROFILE = "SELECT params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"


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

    Raises OSError, naming it, if it is no database of NNI 2.10 or stays locked for 5 seconds.
    """
    try:
        # Read-only, so that nothing is written beside NNI and a missing file is not created.
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            profile = json.loads(database.execute(PROFILE).fetchone()[0])
            events, metrics = (pandas.read_sql(query, database) for query in (EVENTS, METRICS))
        finally:
            database.close()
        metrics["value"] = [finite(json.loads(json.loads(data))) for data in metrics["data"]]
        trials = []
        for id, rows in events.groupby("id", sort=False):
            is_start = rows["event"].isin(["WAITING", "RUNNING"])  # RUNNING may be missed by NNI
            start, end = rows[is_start]["timestamp"].max(), rows[~is_start]["timestamp"].max()
            given = json.loads(rows[rows["event"] == "WAITING"]["data"].iloc[-1])
            reported = metrics[metrics["id"] == id].astype(object).where(lambda x: x.notna(), None)
            finals = reported[reported["type"] == "FINAL"]["value"].tolist()
            trials.append(
                {
                    "trial": int(rows["sequenceId"].iloc[0]),
                    "id": id,
                    "status": rows["event"].iloc[-1],
                    "accuracy": finals[-1] if finals else None,
                    "losses": reported[reported["type"] != "FINAL"]["value"].tolist(),
                    "hyperparameters": given["parameters"],
                    "seconds": finite((end - start) / 1000),
                }
            )
            measure(trials[-1])
    except (sqlite3.Error, pandas.errors.DatabaseError, KeyError, TypeError) as error:
        raise OSError(f"cannot read {path}: {error.__cause__ or error}") from error
    name, command = profile["experimentName"], profile["trialCommand"]
    return {"experiment": experiment, "name": name, "command": command, "trials": trials}


def read_file(path):
    """Return the search in a file, which --json or nnictl's export has written.

    nnictl exports only the trials with a result, without durations, and the losses only with -i.
    Raises OSError or ValueError, naming the file, if it is neither.
    """
    search = read_json(path)
    try:
        if not isinstance(search, dict):
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
                for number, trial in enumerate(search)
            ]
            search = {"experiment": None, "name": path.name, "command": None, "trials": trials}
        search = {key: search[key] for key in ("experiment", "name", "command", "trials")}
        for trial in search["trials"]:
            measure(trial)
        return search
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results of --json or nnictl: {reason}") from error


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


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
    )
    add = parser.add_argument
    latest = "default: the one last started, resumed or viewed by this user"
    add("experiment", nargs="?", metavar="EXPERIMENT_ID", help=latest)
    add("--file", type=Path, help="read results from there instead: of --json or nnictl's export")
    add("--within", type=float, default=0.5, help="points that count as equally good (%(default)s)")
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


def main(argv=None):
    args = parse_args(argv)
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
        sys.exit(f"choose.py: error: --plot needs matplotlib (pip install matplotlib): {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"choose.py: error: {error}")

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
