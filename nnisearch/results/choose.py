"""Choose the trial to keep from a search: a good result first, then a short run.

    nnichoose                         # the latest experiment on this machine
    nnichoose ID --out best.json      # write the choice with its hyperparameters
    nnichoose --file results.json     # read a file of --json, or of nnictl's export
    nnichoose --file FOLDER           # read an experiment's folder

Good trials have a result within --within of the best. The choice is the good trial with the
shortest run, in whole seconds. Among equally short ones it is the trial that learned fastest: the
area under its curve of intermediate results is the least if curves fall, as losses do, and the
greatest if they rise. The experiment may be running, stopped or finished: its database is read.
"""

import collections
import csv
import io
import json
import math
import signal
import sys

from nnisearch.results.importance import hyperparameters, importances
from nnisearch.results.trials import ENDED, NO_RESULT, find_database, read_file
from nnisearch.shared.direction import UNKNOWN
from nnisearch.shared.output import Parser, as_path, may_be_closed, prepare_output, write
from nnisearch.shared.place import runs_on_other_host
from nnisearch.shared.processes import manager_of
from nnisearch.shared.text import one_line

BEST = {"minimize": "least", "maximize": "greatest"}
MOST = 5  # unusable results to name, and trials to name for each of them


def rank(result, direction):
    """Return a number for sorting, which is lower for a better result."""
    return result if direction == "minimize" else -result


def choose(trials, within, direction="maximize"):
    """Return the trial to keep from trials with a result, by the rule at the top of this file."""
    best = min((trial.result for trial in trials), key=lambda result: rank(result, direction))
    # Intermediate results may fall, as losses do, or rise, as accuracies do.
    curves = [trial.intermediate for trial in trials if trial.area is not None]
    falls = sum(curve[0] > curve[-1] for curve in curves)
    rises = sum(curve[0] < curve[-1] for curve in curves)
    is_falling = falls > rises or (falls == rises and direction == "minimize")

    def is_good(trial):
        gap = abs(best - trial.result)
        return gap <= within or math.isclose(gap, within)  # 63.04 - 62.54 is greater than 0.5

    def cost(trial):
        seconds = math.inf if trial.seconds is None else round(trial.seconds)
        area = math.inf
        if trial.area is not None:
            area = trial.area if is_falling else -trial.area
        return seconds, area, rank(trial.result, direction), trial.number

    return min(filter(is_good, trials), key=cost)


def rule(within, direction):
    """Return the rule of choose() as text."""
    near = f"within {within:g} of the" if within else "with the"
    return f"the shortest one {near} {BEST[direction]} result, then the one that learned fastest"


def cell(value):
    """Return a hyperparameter as short text for a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) and value.strip() else json.dumps(value)
    return one_line(text, 40)


def table(trials, choice):
    """Return a table of trials as text; an asterisk marks the choice."""
    given, keys = hyperparameters(trials)
    rows = [["", "trial", "result", "seconds", "last", "area", *map(cell, keys)]]
    for trial, values in zip(trials, given, strict=True):
        numbers = (("result", ".6g"), ("seconds", ".0f"), ("last", ".4g"), ("area", ".4g"))
        known = [(getattr(trial, key), form) for key, form in numbers]
        measured = ["-" if value is None else format(value, form) for value, form in known]
        cells = [cell(values[key]) if key in values else "-" for key in keys]
        mark = "*" if trial is choice else ""
        rows.append([mark, str(trial.number), *measured, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (map(str.rjust, row, widths) for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def as_csv(trials):
    """Return trials as CSV, with a column per hyperparameter; texts are unchanged."""
    measured = ["trial", "id", "result", "seconds", "last", "area"]
    rows = [[trial.as_json()[key] for key in measured] for trial in trials]
    given, keys = hyperparameters(trials)
    for row, values in zip(rows, given, strict=True):
        for value in map(values.get, keys):
            is_plain = value is None or isinstance(value, (str, int, float))
            row.append(value if is_plain else json.dumps(value))
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([[*measured, *keys], *rows])
    return file.getvalue()


def plot(trials, choice, top, direction):
    """Return a PNG: best so far, result by duration, the best trials' curves, and importances.

    trials are sorted, the best first; curves are drawn for the first top of them. Raises
    ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    shares = importances(trials)
    rows, columns = (2, 2) if shares else (1, 3)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    progress, cost, curves, *rest = figure.subplots(rows, columns).flat
    in_turn = sorted(trials, key=lambda trial: trial.number)
    better = min if direction == "minimize" else max
    best = []
    for trial in in_turn:
        best.append(better([*best[-1:], trial.result]))
    label = f"the choice, trial {choice.number}: {choice.result:.6g}"
    progress.step([trial.number for trial in in_turn], best, "k", where="post", label="best so far")
    for axes, key in ((progress, "number"), (cost, "seconds")):
        known = [trial for trial in trials if getattr(trial, key) is not None]
        places, results = [getattr(t, key) for t in known], [t.result for t in known]
        axes.scatter(places, results, s=14, c="#4c6a92", alpha=0.6)
        if (place := getattr(choice, key)) is not None:
            axes.scatter(place, choice.result, 140, "#c1272d", marker="*", zorder=3, label=label)
    progress.set(xlabel="trial", ylabel="result", title="Best so far")
    cost.set(xlabel="duration in s", ylabel="result", title="Result by duration")

    drawn = [trial for trial in trials[:top] if trial is not choice]
    for trial in [*reversed(drawn), choice]:  # the choice on top
        values = [math.nan if value is None else value for value in trial.intermediate]
        chosen = {"color": "#c1272d", "linewidth": 2, "label": label}
        style = chosen if trial is choice else {"color": "#4c6a92", "alpha": 0.45, "linewidth": 1}
        marker = "." if len(values) == 1 else None
        places = [100 * (order + 1) / len(values) for order in range(len(values))]
        curves.plot(places, values, marker=marker, **style)
    title = f"Intermediate results of the top {len(drawn) + 1}"
    curves.set(xlabel="part of the trial in %", ylabel="intermediate result", title=title)
    for axes in (progress, cost, curves):
        axes.legend(*axes.get_legend_handles_labels(), frameon=False)
        axes.grid(alpha=0.25)
    for axes in rest:
        # $ would start a formula.
        names = [cell(key).replace("$", r"\$") for key in shares]
        axes.barh(names, [100 * share for share in shares.values()], color="#4c6a92")
        axes.invert_yaxis()
        axes.set(xlabel="importance in %", title=f"Importance, by {len(trials)} trials")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def parse_args(argv, prog, within):
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    latest = "default: the experiment that you last started, resumed or viewed"
    add("experiment", nargs="?", metavar="EXPERIMENT_ID", help=latest)
    add("--file", help="an experiment's folder, or JSON of --json or of nnictl's export")
    equal = "results so close to the best count as equally good; in the results' unit (%(default)s)"
    add("--within", type=float, default=within, help=equal)
    add("--top", type=int, default=10, help="number of trials in the table (%(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all trials as JSON")
    output.add_argument("--csv", action="store_true", help="print the trials with a result as CSV")
    add("--out", metavar="FILE", help="write the choice to this file, as JSON")
    add("--plot", metavar="FILE.png", help="draw the search into this file (needs matplotlib)")
    args = parser.parse_args(argv)
    if not 0 <= args.within < math.inf:
        parser.error(f"--within is {args.within}; allowed: a finite number >= 0")
    if args.top < 1:
        parser.error(f"--top is {args.top}; allowed: an integer >= 1")
    for key in ("file", "out", "plot"):
        given = getattr(args, key)
        if given == "":
            parser.error(f"--{key} is ''; allowed: the name of a file")
        setattr(args, key, given and as_path(given))
    if args.file and args.experiment:
        parser.error(f"EXPERIMENT_ID is {args.experiment!r}; allowed: none, with --file")
    return args


def left_out(trials):
    """Return a text that counts the trials without a result, "" if there are none."""
    states = {
        "SUCCEEDED": "without a result",
        "EARLY_STOPPED": "EARLY_STOPPED (by maxTrialDuration or an assessor)",
    }
    counts = collections.Counter(
        states.get(trial.status, one_line(trial.status)) for trial in trials if not trial.has_result
    )
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def no_results(trials):
    """Return a line for each reported value that is no result."""
    named = collections.defaultdict(list)
    for trial in trials:
        if trial.reported is not None:
            named[one_line(trial.reported)].append(f"{trial.number} ({one_line(trial.id)})")
    lines = []
    for reported, who in list(named.items())[:MOST]:
        more = f" and {len(who) - MOST} more" if len(who) > MOST else ""
        lines.append(f"trial {', '.join(who[:MOST])}{more} reported {reported}, {NO_RESULT}")
    if len(named) > MOST:
        lines.append(f"and {len(named) - MOST} other things")
    return lines


def left_behind(search, folder):
    """Return a line if trials have not ended, but the search's manager does not run here.

    folder is the experiment's.
    """
    unended = {one_line(trial.status) for trial in search["trials"]} - ENDED
    if not unended or not search["experiment"] or manager_of(search["experiment"]):
        return []
    left = "no manager of this search runs on this machine, so this is the state it was left in"
    return [f"{' and '.join(sorted(unended))}: {runs_on_other_host(folder) or left}"]


def main(argv=None, prog="nnichoose", within=0.0, was_watched=False):
    """Print a search's results, and write the files that the arguments name.

    was_watched: the user already knows if the direction of the search is unknown.
    """
    prepare_output()
    args = parse_args(argv, prog, within)
    with may_be_closed():
        try:
            show(args, was_watched)
        except ImportError as error:
            sys.exit(f"{prog}: error: --plot needs matplotlib (pip install matplotlib): {error}")
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except (OSError, ValueError) as error:
            sys.exit(f"{prog}: error: {one_line(error)}")


def show(args, was_watched):
    """Read, choose, and print or write. Raises OSError, ValueError or ImportError."""
    path = args.file or find_database(args.experiment)
    search = read_file(path)
    everything = search["trials"]
    is_named = bool(search["name"])  # NNI's experimentName is optional
    title = one_line(search["name"] if is_named else search["experiment"])
    trials = [trial for trial in everything if trial.has_result]
    notes = [
        *no_results(everything),
        *left_behind(search, path if path.is_dir() else path.parent.parent),
    ]
    if not trials:
        why = "; ".join(filter(None, [left_out(everything), *notes]))
        none = f"{title}: none of {len(everything)} trials has a result"
        raise ValueError(f"{none}: {why}" if why else none)
    if search["direction"] is None:
        search["direction"] = "maximize"
        notes += [] if was_watched else [UNKNOWN]
    trials.sort(key=lambda trial: (rank(trial.result, search["direction"]), trial.number))
    choice = choose(trials, args.within, search["direction"])
    picture = plot(trials, choice, args.top, search["direction"]) if args.plot else None
    if args.out:
        kept = {"experiment": search["experiment"]}
        kept |= {key: choice.as_json()[key] for key in ("trial", "id", "result", "hyperparameters")}
        write(args.out, json.dumps(kept, indent=4).encode() + b"\n")
    if args.plot:
        write(args.plot, picture)

    if args.json:
        shown = {"trials": [trial.as_json() for trial in everything], "choice": choice.id}
        print(json.dumps(search | shown))
    elif args.csv:
        print(as_csv(trials), end="")
    else:
        source = one_line(search["experiment"] or args.file)
        print(f"{source}: {title}" if is_named else source)
        print(table(trials[: args.top], choice))
        others = left_out(everything)
        others = f"; left out: {others}" if others else ""
        print(f"{len(trials)} of {len(everything)} trials have a result{others}")
        for line in notes:
            print(line)
        shares = [f"{cell(key)} {share:.0%}" for key, share in importances(trials).items()]
        if shares:
            print(f"Importance, by {len(trials)} trials: {', '.join(shares)}")
        who = f"trial {choice.number} ({one_line(choice.id)})"
        print(f"* the choice, {who}: {rule(args.within, search['direction'])}")
        print(json.dumps(choice.hyperparameters).replace("\x7f", "\\u007f"))


if __name__ == "__main__":
    main()
