"""How a search goes on: a bar over its trials, or a line for each where there is no terminal.

It promises: each thing that a user should know, such as why a trial has failed or what the trials
wait for, is said when it is known, and once.
"""

import collections
import json
import re
import time
from pathlib import Path

from nni.experiment import rest
from tqdm import tqdm

from nnisearch.config import is_local
from nnisearch.gpus import waiting_for
from nnisearch.rehearsal import reason
from nnisearch.results import finite

ENDED = {"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}


def watch(id, port, config):
    """Show how a search goes on until its trials have ended; return whether one has a result.

    Raises RuntimeError if the search ends in another way.
    """
    best_result = best_of(config)
    notices = Notices(config, Path(config.experiment_working_directory, id))
    shown = set()
    with tqdm(total=config.max_trial_number, unit="trial", disable=None, dynamic_ncols=True) as bar:
        while True:
            try:
                what = ("check-status", "trial-jobs", "metric-data-latest")
                status, trials, metrics = (rest.get(port, f"/{name}") for name in what)
            except OSError:
                raise RuntimeError(f"search {id} has been stopped") from None
            for line in notices(trials, metrics):
                tqdm.write(line)
            ended = [trial for trial in trials if trial["status"] in ENDED]
            values = {trial["trialJobId"]: final_result(trial) for trial in ended}
            results = [value for value in values.values() if value is not None]
            best = f"best {best_result(results):g}" if results else "no result yet"
            for trial in ended if bar.disable else []:
                if trial["trialJobId"] not in shown:
                    value = values[trial["trialJobId"]]
                    result = trial["status"] if value is None else f"{value:g}"
                    tqdm.write(f"{title(trial)}: {result}; {best}")
                    shown.add(trial["trialJobId"])
            counts = collections.Counter(trial["status"].lower() for trial in trials)
            bar.n = len(ended)
            bar.set_postfix_str(", ".join([best, *(f"{n} {state}" for state, n in counts.items())]))
            if status["status"] == "ERROR":
                raise RuntimeError(f"search {id}: {' '.join(status['errors'])}")
            no_more = status["status"] in ("DONE", "TUNER_NO_MORE_TRIAL")
            if no_more and len(ended) == len(trials):
                return bool(results)
            time.sleep(1)


class Notices:
    """What a user should be told of a search that runs, each thing once."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.said, self.failed = set(), set()
        self.heard, self.longest = {}, 0  # ms: when each trial reported last; the longest silence

    def __call__(self, trials, metrics):
        """Return the lines that are new, given the trials and their latest metrics from NNI."""
        found = {}
        for trial in trials:
            if trial["status"] == "FAILED" and trial["trialJobId"] not in self.failed:
                self.failed.add(trial["trialJobId"])  # its stderr is read once
                why = failure(trial, self.folder)
                found[why] = f"{title(trial)} has FAILED: {why}"
        states = {trial["status"] for trial in trials}
        is_waiting = "WAITING" in states and "RUNNING" not in states
        if is_waiting and self.config.trial_gpu_number and is_local(self.config):
            holders = waiting_for(self.config.training_service)
            found[holders] = holders and f"trials wait for a GPU: {holders}"
        if not is_local(self.config):
            found |= self.silent(trials, metrics)
        new = {about: line for about, line in found.items() if line and about not in self.said}
        self.said |= new.keys()
        return list(new.values())

    def silent(self, trials, metrics):
        """Return {trial: line} for those that are silent for longer than any before."""
        found = {}
        for trial in trials:
            id = trial["trialJobId"]
            times = [metric["timestamp"] for metric in metrics if metric["trialJobId"] == id]
            latest = max([trial.get("startTime", 0), *times])
            self.longest = max(self.longest, latest - self.heard.get(id, latest))
            self.heard[id] = latest
            silence = time.time() * 1000 - latest
            if (
                trial["status"] == "RUNNING"
                and self.longest
                and silence > max(60_000, self.longest)
            ):
                known = re.match(r"\w+://([^/:]+)", trial.get("logPath", ""))
                machine = known[1] if known else "its machine"
                found[id] = (
                    f"{title(trial)} on {machine} has reported nothing for {silence / 1000:.0f} s;"
                    f" if the machine is dead: nnictl trial kill {self.folder.name} -T {id}"
                )
        return found


def title(trial):
    return f"trial {trial['sequenceId']} ({trial['trialJobId']})"


def failure(trial, folder):
    """Return why a trial has failed: from its stderr on this machine, else where to look."""
    try:
        text = (folder / "trials" / trial["trialJobId"] / "stderr").read_text(errors="replace")
    except OSError:
        return f"its files are at {trial.get('logPath', 'no place that NNI knows')}"
    return reason(text)


def final_result(trial):
    """Return a trial's final result as NNI lists it, a finite number, or None."""
    for metric in trial.get("finalMetricData", []):
        value = json.loads(json.loads(metric["data"]))
        return finite(value.get("default") if isinstance(value, dict) else value)


def best_of(config):
    """Return which of its results is a search's best: min or max."""
    return {"minimize": min}.get((config.tuner.class_args or {}).get("optimize_mode"), max)
