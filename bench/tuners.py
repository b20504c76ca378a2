"""Replay searches by many tuners on recorded trainings; print their best accuracy over time.

    python bench/tuners.py     # 50 searches by each, 7 minutes on 2 cores
    python bench/tuners.py --tuners random "Optuna's GPSampler" --plot docs/tuners.png     # some

Nothing is trained: a model predicts the accuracy and the seconds of a trial. It has learned them
from the trainings in bench/table.json, which bench/record.py records. Its error at points that it
has not seen is printed first. Two trials run at a time.
"""

import argparse
import heapq
import json
import logging
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor

os.environ["OMP_NUM_THREADS"] = "1"  # one core per process; before numpy and torch are imported

import numpy as np
from experiment import ROOT
from nni.algorithms.hpo.evolution_tuner import EvolutionTuner
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.algorithms.hpo.random_tuner import RandomTuner
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.runtime import msg_dispatcher_base
from record import TABLE
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict

sys.path.insert(0, str(ROOT))
from nnisearch.shared.output import as_path
from nnisearch.tuners import Hyperband, OptunaTuner

GOAL = 64.28  # of the 2020 write-up, in %


class HyperbandTuner:
    """nnisearch.tuners.Hyperband with a tuner's methods: by itself it talks to NNI's manager."""

    def __init__(self, R, eta, seed, **arguments):
        # With this address of NNI's own tests it talks to no manager.
        nowhere = msg_dispatcher_base.dispatcher_env_vars._replace(
            NNI_TUNER_COMMAND_CHANNEL="ws://_unittest_"
        )
        msg_dispatcher_base.dispatcher_env_vars = nowhere
        self.advisor = Hyperband(optimize_mode="maximize", R=R, eta=eta, **arguments)
        self.seed = seed
        self.ids = {}

    def update_search_space(self, space):
        self.advisor.handle_update_search_space({k: v for k, v in space.items() if k != "epochs"})
        self.advisor.random_state = np.random.RandomState(self.seed)

    def generate_parameters(self, parameter_id):
        job = self.advisor._get_one_trial_job()
        self.ids[parameter_id] = job["parameter_id"]
        return dict(job["parameters"])

    def receive_trial_result(self, parameter_id, parameters, value):
        metric = {"parameter_id": self.ids[parameter_id], "trial_job_id": parameter_id}
        self.advisor.handle_report_metric_data(metric | {"type": "FINAL", "value": str(value)})

    def trial_end(self, parameter_id, success):
        given = json.dumps({"parameter_id": self.ids[parameter_id]})
        self.advisor.handle_trial_end({"trial_job_id": parameter_id, "hyper_params": given})


def tpe(jobs):
    return lambda seed: TpeTuner(tpe_args={"n_startup_jobs": jobs}, seed=seed)


def evolution(seed):
    random.seed(seed)  # it also draws numbers without a seed, so its row varies a little
    return EvolutionTuner(population_size=8)


def optuna(sampler, **arguments):
    return lambda seed: OptunaTuner(sampler, arguments, seed)


TUNERS = {  # {name: a function from a seed to a tuner}
    "random": lambda seed: RandomTuner(seed=seed),
    "NNI's GridSearch": lambda seed: GridSearchTuner(),
    "NNI's Evolution": evolution,
    "NNI's TPE, n_startup_jobs 20 (as shipped)": tpe(20),
    "NNI's TPE, n_startup_jobs 15": tpe(15),
    "NNI's TPE, n_startup_jobs 10": tpe(10),
    "NNI's TPE, n_startup_jobs 5": tpe(5),
    "Hyperband, R 10, eta 2": lambda seed: HyperbandTuner(10, 2, seed),
    "Hyperband, R 10, eta 5": lambda seed: HyperbandTuner(10, 5, seed),
    "Optuna's TPESampler": optuna("TPESampler"),
    "Optuna's GPSampler": optuna("GPSampler"),
    "Optuna's GPSampler, n_startup_trials 4": optuna("GPSampler", n_startup_trials=4),
}


def features(given):
    """Return the model's input for a training's hyperparameters, a list of numbers.

    The usual learning rate grows with the batch size for SGD, and with its square root for the
    others.
    """
    size, lr, name = given["batch_size"], given["lr"], given["optimizer"]
    usual = {
        "SGD": 0.002 * size * (1 - given["momentum"]),
        "Adam": 0.00017 * size**0.5,
        "Muon": 0.0025 * size**0.5,
    }
    reach = lr / (1 - given["momentum"])  # how far a gradient that stays the same moves a weight
    logarithms = np.log([size, lr, given["epochs"], reach, reach / size, lr / usual[name]])
    schedule = given["lr_schedule"] == "one_cycle"
    return [*logarithms, given["momentum"], schedule, *(name == other for other in usual)]


class Model:
    """Predicts the accuracy in percent and the seconds of a training."""

    def __init__(self, rows):
        self.trees = ExtraTreesRegressor(200, max_features=0.5, random_state=0)
        self.inputs = [features(row["hyperparameters"]) for row in rows]
        self.targets = [(row["test"], np.log(row["seconds"])) for row in rows]
        points = [{**row["hyperparameters"], "epochs": None} for row in rows]
        self.groups = [points.index(point) for point in points]
        self.trees.fit(self.inputs, self.targets)

    def predict(self, given):
        ((accuracy, logarithm),) = self.trees.predict([features(given)])
        return accuracy, np.exp(logarithm)

    def report(self):
        """Print the error at unseen points, by cross-validation with ten folds."""
        folds = GroupKFold(10)
        guessed = cross_val_predict(
            self.trees, self.inputs, self.targets, groups=self.groups, cv=folds
        )
        for name, true, guess in zip(
            ("accuracy, points", "seconds, logarithm"),
            np.transpose(self.targets),
            np.transpose(guessed),
            strict=True,
        ):
            off = np.abs(guess - true)
            print(
                f"{name}: off by {np.median(off):.2f} in the median, {off.mean():.2f} in the mean, "
                f"correlation {np.corrcoef(true, guess)[0, 1]:.3f}"
            )


def replay(tuner, model, seconds, at_a_time=2):
    """Return [(end in s, accuracy in percent), ...] of a search's trials, by their ends."""
    now, number, running, ended = 0, 0, [], []
    while now <= seconds:
        while len(running) < at_a_time:
            given = tuner.generate_parameters(number)
            accuracy, duration = model.predict(given)
            heapq.heappush(running, (now + duration, number, given, accuracy))
            number += 1
        now, id, given, accuracy = heapq.heappop(running)
        ended.append((now, accuracy))
        tuner.receive_trial_result(id, given, accuracy)
        tuner.trial_end(id, True)
    return ended


def search(name, seed, seconds, model, space):
    """Return replay() for the tuner of that name."""
    tuner = TUNERS[name](seed)
    tuner.update_search_space(space)
    return replay(tuner, model, seconds)


def best_so_far(ended, times):
    """Return the best accuracy, in percent, at each of times, in s."""
    when, accuracies = np.reshape(ended, (-1, 2)).T  # also if there is none
    best = np.maximum.accumulate([10, *accuracies])  # 10: chance, before the first has ended
    return best[np.searchsorted(when, times, side="right")]


def first(ended, goal):
    """Return the number, from 1, and the end of the first trial to reach goal; infinite if none."""
    reached = [(i, when) for i, (when, accuracy) in enumerate(ended, 1) if accuracy >= goal]
    return reached[0] if reached else (np.inf, np.inf)


def draw(curves, times):
    """Return a figure of the best so far over the seconds: medians and quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        low, middle, high = np.percentile(rows, (25, 50, 75), axis=0)
        (line,) = axes.plot(times, middle, label=name)
        axes.fill_between(times, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(
        xlabel="seconds of the search, two trials at a time", ylabel="best accuracy so far in %"
    )
    axes.set_ylim(50)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=50, help="searches by each tuner")
    parser.add_argument("--seconds", type=float, default=900, help="of a search")
    names = list(TUNERS)
    parser.add_argument("--tuners", nargs="+", default=names, choices=names, help="some of them")
    parser.add_argument("--plot", type=as_path, metavar="FILE.png", help="draw the searches there")
    args = parser.parse_args()
    logging.disable()  # the tuners log their seeds
    rows = json.loads(TABLE.read_text())["rows"]
    space = json.loads((ROOT / "search_space.json").read_text())
    model = Model(rows)
    print(f"{len(rows)} trainings; the model of them:")
    model.report()
    times = np.linspace(0, args.seconds, 241)
    shown = [60, 120, 240]  # a quarter, half and all of the seconds
    headings = [f"after {times[place]:.0f} s" for place in shown]
    print("| tuner |", " | ".join(headings), f"| trials to {GOAL} % | seconds to {GOAL} % |")
    print("| --- " * (3 + len(shown)) + "|", flush=True)
    curves = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name in args.tuners:
            jobs = [
                pool.submit(search, name, seed, args.seconds, model, space)
                for seed in range(args.repetitions)
            ]
            searches = [job.result() for job in jobs]
            curves[name] = [best_so_far(ended, times) for ended in searches]
            spread = np.percentile(curves[name], (50, 25, 75), axis=0)
            cells = ["{:.1f} ({:.1f} to {:.1f})".format(*spread[:, place]) for place in shown]
            trials, seconds = np.median([first(ended, GOAL) for ended in searches], axis=0)
            print(f"| {name} |", " | ".join(cells), f"| {trials:.0f} | {seconds:.0f} |", flush=True)
    if args.plot:
        draw(curves, times).savefig(args.plot, dpi=110)


if __name__ == "__main__":
    main()
