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
import json
import math
import signal
import sys
from argparse import Namespace
from pathlib import Path

from nnisearch.results.experiments import find_database
from nnisearch.results.files import read_file
from nnisearch.results.importance import importances
from nnisearch.results.plot import plot
from nnisearch.results.table import cell, table
from nnisearch.results.trials import ENDED, NO_RESULT, Trial
from nnisearch.shared.direction import DIRECTIONS
from nnisearch.shared.output import Parser, as_path, may_be_closed, prepare_output, write
from nnisearch.shared.place import runs_on_other_host
from nnisearch.shared.processes import argument_of, manager_of
from nnisearch.shared.text import one_line

MOST = 5  # lines on values that are no results


def rank(result: float, direction: str) -> float:
    """Return a number for sorting, which is lower for a better result."""
    return result if direction == "minimize" else -result


def choose(trials: list[Trial], within: float, direction: str = "maximize") -> Trial:
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


def rule(within: float, direction: str) -> str:
    """Return the rule of choose() as text."""
    near = f"within {within:g} of the" if within else "with the"
    return (
        f"the shortest one {near} {DIRECTIONS[direction]} result, then the one that learned fastest"
    )


def parse_args(argv: list[str] | None, prog: str, within: float) -> Namespace:
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    latest = "default: the experiment that you last started, resumed or viewed"
    add("experiment", nargs="?", metavar="EXPERIMENT_ID", help=latest)
    source = "an experiment's folder, or JSON of --json or of nnictl's export"
    add("--file", type=as_path, help=source)
    equal = "results so close to the best count as equally good; in the results' unit (%(default)s)"
    add("--within", type=float, default=within, help=equal)
    mode = parser.add_mutually_exclusive_group()
    for direction, best in DIRECTIONS.items():
        how = {"action": "store_const", "const": direction, "dest": "direction"}
        mode.add_argument(f"--{direction}", help=f"the {best} result is the best", **how)
    add("--top", type=int, default=10, help="number of trials in the table (%(default)s)")
    add("--json", action="store_true", help="print all trials as JSON")
    picture = "draw the search into this file (needs matplotlib)"
    add("--out", type=as_path, metavar="FILE", help="write the choice to this file, as JSON")
    add("--plot", type=as_path, metavar="FILE.png", help=picture)
    args = parser.parse_args(argv)
    if not 0 <= args.within < math.inf:
        parser.error(f"--within is {args.within}; allowed: a finite number >= 0")
    if args.top < 1:
        parser.error(f"--top is {args.top}; allowed: an integer >= 1")
    if args.file and args.experiment:
        parser.error(f"EXPERIMENT_ID is {args.experiment!r}; allowed: none, with --file")
    return args


def left_out(trials: list[Trial]) -> str:
    """Return a text that counts the trials without a result, "" if there are none."""
    states = {
        "SUCCEEDED": "without a result",
        "EARLY_STOPPED": "EARLY_STOPPED (by maxTrialDuration or an assessor)",
    }
    counts = collections.Counter(
        states.get(trial.status, one_line(trial.status)) for trial in trials if not trial.has_result
    )
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def no_results(trials: list[Trial]) -> list[str]:
    """Return a line for each of the first reported values that are no results."""
    titles = collections.defaultdict(list)
    for trial in trials:
        if trial.reported is not None:
            titles[one_line(trial.reported)].append(trial.title())
    lines = []
    for value, (first, *others) in list(titles.items())[:MOST]:
        more = f" and {len(others)} more" if others else ""
        lines.append(f"{first}{more} reported {value}, {NO_RESULT}")
    return lines


def left_behind(search: dict, folder: Path) -> list[str]:
    """Return a line if trials have not ended, but the search does not go on here.

    folder is the experiment's.
    """
    unended = {one_line(trial.status) for trial in search["trials"]} - ENDED
    manager = manager_of(search["experiment"])
    goes_on = manager and argument_of(manager, "--action") != "view"
    if not unended or not search["experiment"] or goes_on:
        return []
    left = "no manager continues this search on this machine, so this is the state it was left in"
    return [f"{' and '.join(sorted(unended))}: {runs_on_other_host(folder) or left}"]


def main(
    argv: list[str] | None = None,
    prog: str = "nnichoose",
    within: float = 0.0,
    was_watched: bool = False,
) -> None:
    """Print a search's results, and write the files that the arguments name.

    was_watched: the user already knows which result counts as the best.
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


def show(args: Namespace, was_watched: bool) -> None:
    """Read, choose, and print or write. Raises OSError, ValueError or ImportError."""
    path = args.file or find_database(args.experiment)
    search = read_file(path)
    everything = search["trials"]
    name = one_line(search["name"] or search["experiment"])  # NNI's experimentName is optional
    trials = [trial for trial in everything if trial.has_result]
    folder = path if path.is_dir() else path.parent.parent
    notes = no_results(everything) + left_behind(search, folder)
    if not trials:
        why = "; ".join(filter(None, [left_out(everything), *notes]))
        none = f"{name}: none of {len(everything)} trials has a result"
        raise ValueError(f"{none}: {why}" if why else none)
    direction = args.direction or search["direction"]
    if direction is None and not was_watched:
        why = "since no optimize_mode is known; for the least: --minimize"
        notes.append(f"The greatest result counts as the best, {why}")
    search["direction"] = direction = direction or "maximize"
    trials.sort(key=lambda trial: (rank(trial.result, direction), trial.number))
    choice = choose(trials, args.within, direction)
    shares = importances(trials) if args.plot or not args.json else {}
    picture = plot(trials, choice, args.top, direction, shares) if args.plot else None
    if args.out:
        kept = {"experiment": search["experiment"]}
        kept |= {key: choice.as_json()[key] for key in ("trial", "id", "result", "hyperparameters")}
        write(args.out, json.dumps(kept, indent=4).encode() + b"\n")
    if picture:
        write(args.plot, picture)

    if args.json:
        shown = {"trials": [trial.as_json() for trial in everything], "choice": choice.id}
        print(json.dumps(search | shown))
        return
    source = one_line(search["experiment"] or args.file)
    print(f"{source}: {name}" if search["name"] else source)
    print(table(trials, args.top, choice))
    others = left_out(everything)
    others = f"; left out: {others}" if others else ""
    print(f"{len(trials)} of {len(everything)} trials have a result{others}")
    for line in notes:
        print(line)
    if shares:
        parts = [f"{cell(key)} {share:.0%}" for key, share in shares.items()]
        print(f"Importance, by {len(trials)} trials: {', '.join(parts)}")
    print(f"* the choice, {choice.title()}: {rule(args.within, direction)}")
    print(json.dumps(choice.hyperparameters).replace("\x7f", "\\u007f"))


if __name__ == "__main__":
    main()
