"""Draws a search."""

import io
import math

from nnisearch.results.table import cell
from nnisearch.results.trials import Trial

RED, BLUE = "#c1272d", "#4c6a92"  # the choice, and the other trials


def plot(
    trials: list[Trial], choice: Trial, top: int, direction: str, shares: dict[str, float]
) -> bytes:
    """Return a PNG: best so far, result by duration, the best trials' curves, and importances.

    trials are sorted, the best first; curves are drawn for the first top of them. shares is what
    importances() returns. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

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
        measured = [trial for trial in trials if getattr(trial, key) is not None]
        places, results = [getattr(t, key) for t in measured], [t.result for t in measured]
        axes.scatter(places, results, s=14, c=BLUE, alpha=0.6)
        if (place := getattr(choice, key)) is not None:
            axes.scatter(place, choice.result, 140, RED, marker="*", zorder=3, label=label)
    progress.set(xlabel="trial", ylabel="result", title="Best so far")
    cost.set(xlabel="duration in s", ylabel="result", title="Result by duration")

    drawn = [trial for trial in trials[:top] if trial is not choice]
    for trial in [*reversed(drawn), choice]:  # the choice on top
        values = [math.nan if value is None else value for value in trial.intermediate]
        chosen = {"color": RED, "linewidth": 2, "label": label}
        style = chosen if trial is choice else {"color": BLUE, "alpha": 0.45, "linewidth": 1}
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
        axes.barh(names, [100 * share for share in shares.values()], color=BLUE)
        axes.invert_yaxis()
        axes.set(xlabel="importance in %", title=f"Importance, by {len(trials)} trials")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
