"""Shows a running search: a progress bar, or one line per trial without a terminal.

It prints once what a user should know, such as why a trial has failed or what trials wait for. It
ends when the search cannot continue. Each pass only reads new events, so its cost does not grow
with the number of trials.
"""

import collections
import contextlib
import math
import re
import threading
import time
from pathlib import Path

from nni.experiment import rest
from nni.experiment.config.utils import parse_time
from tqdm import tqdm

from nnisearch.before.config import is_local
from nnisearch.before.gpus import waiting_for
from nnisearch.elsewhere import slurm
from nnisearch.results.trials import ENDED, NO_RESULT, Trials
from nnisearch.shared.direction import UNKNOWN, direction
from nnisearch.shared.output import may_be_closed
from nnisearch.shared.text import one_line, reason, tail
from nnisearch.watch.liveness import Life, Log, listed

# tqdm's default lock is for several processes, and starts another process in Python 3.14.
tqdm.set_lock(threading.RLock())

SILENCE = 20  # s without an answer of the manager until a line says so
IDLE = 60  # s without a trial and without a proposal of the tuner until a line says so
ASK = 10  # s between two queries to SLURM's controller, which serves other users, too
NO_WORDS = "no error message; was it killed?"
QUIET = 6  # s: longer than the pause of NNI's loop that starts waiting trials


def watch(id, port, config, resume, choose):
    """Show a search until all its trials have ended; return whether a trial has a result.

    resume and choose are the commands that continue the search and show its results. Raises
    RuntimeError if the search ends in another way.
    """
    folder = Path(config.experiment_working_directory, id)
    with (
        may_be_closed(),
        tqdm(total=config.max_trial_number, unit="trial", disable=None, dynamic_ncols=True) as bar,
    ):
        search = Search(id, port, folder, resume, choose)
        display = Display(config, folder, bar)
        while True:
            status, changed = search.ask()
            if status is not None:
                display.show(search.trials.known, changed)
                if search.is_done(status) and not display.late:
                    if line := search.shortfall(status):
                        tqdm.write(line)
                    return display.end()
                search.check(status)
            time.sleep(1)


class Search:
    """A watched search: its state and its trials; notices when it cannot continue."""

    def __init__(self, id, port, folder, resume, choose):
        self.id, self.port, self.resume, self.choose = id, port, resume, choose
        self.prefix = listed(id).get("prefixUrl")
        self.trials = Trials(folder / "db" / "nni.sqlite")
        self.life = Life(id, folder)
        self.heard = self.changed = time.monotonic()  # when it last answered, and last changed
        self.is_silent = self.is_idle = False

    def ask(self):
        """Return the manager's status and the trials that have changed.

        Returns None and [] if one of the two cannot be read now. Raises RuntimeError if the manager
        has ended or the database has been removed.
        """
        try:
            status = rest.get(self.port, "/check-status", prefix=self.prefix)
        except OSError as error:
            silence = time.monotonic() - self.heard
            if self.life.is_over() or (self.life.manager is None and silence > SILENCE):
                raise RuntimeError(self.death()) from None
            return self.silence(error)
        if self.life.is_over():  # somebody else has the port now, and has answered
            raise RuntimeError(self.death())
        try:
            changed = self.trials.update()
        except OSError as error:
            if self.trials.path.exists():
                return self.silence(error)
            said = one_line(" ".join(status.get("errors", []))) or status["status"]
            end = f"kill {self.life.manager.pid}" if self.life.manager else "end its manager"
            what = f"{self.trials.path} has been removed; NNI's manager says: {said}"
            raise RuntimeError(f"search {self.id}: {what}; to end it: {end}") from None
        self.heard, self.is_silent = time.monotonic(), False
        if changed:
            self.changed, self.is_idle = self.heard, False
        return status, changed

    def silence(self, error):
        """Print once that the search has not answered for SILENCE seconds; return None and []."""
        silence = time.monotonic() - self.heard
        if silence > SILENCE and not self.is_silent:
            self.is_silent = True
            tqdm.write(
                f"search {self.id} has not answered for {silence:.0f} s; still waiting:"
                f" {one_line(error)}"
            )
        return None, []

    def is_done(self, status):
        """Return whether all trials have ended and no more will start."""
        if any(trial.status not in ENDED for trial in self.trials.known.values()):
            return False
        if status["status"] in ("DONE", "VIEWED"):
            return True
        if status["status"] != "TUNER_NO_MORE_TRIAL" or time.monotonic() - self.changed < QUIET:
            return False
        started = [trial.number for trial in self.trials.known.values()]
        following = self.profile().get("nextSequenceId", math.inf)
        return following <= 1 + max(started, default=-1)  # no trial is queued

    def profile(self):
        """Return NNI's profile of the search, {} if the manager does not answer."""
        try:
            return rest.get(self.port, "/experiment", prefix=self.prefix)
        except OSError:
            return {}

    def shortfall(self, status):
        """Return why a search has ended before maxTrialNumber trials, "" if it has not."""
        params = self.profile().get("params", {})  # they may have changed since the start
        limit, asked = params.get("maxExperimentDuration"), params.get("maxTrialNumber") or 0
        why = {
            "TUNER_NO_MORE_TRIAL": "The tuner has no more",
            "DONE": f"maxExperimentDuration is {limit}, and has passed",
        }.get(status["status"])
        ended = len(self.trials.known)
        if why is None or ended >= asked:
            return ""
        return f"{why} after {ended} trials; maxTrialNumber is {asked}"

    def check(self, status):
        """Raise RuntimeError if the search cannot continue. It says why, and how to continue."""
        if status["status"] in ("STOPPING", "STOPPED"):
            raise RuntimeError(f"search {self.id} has been stopped; {self.next_steps()}")
        if status["status"] == "VIEWED":
            how = f"to continue it: nnictl stop {self.id}; {self.resume}"
            raise RuntimeError(f"search {self.id} is shown by nnictl view, and does not run; {how}")
        is_dead = self.life.tuner_is_dead()
        if is_dead or status["status"] == "ERROR":
            how = self.next_steps(f"nnictl stop {self.id}; ")
            what = self.life.tuners_end()
            if not what:
                who = "the tuner has died" if is_dead else "NNI's manager has given up"
                words = self.life.last_words() or one_line(" ".join(status["errors"]))
                what = f"{who}: {words or NO_WORDS}"
            raise RuntimeError(f"search {self.id}: {what}; {how}")
        idle = time.monotonic() - self.changed
        has_trials = any(trial.status not in ENDED for trial in self.trials.known.values())
        if idle > IDLE and not has_trials and not self.is_idle:
            self.is_idle = True
            tqdm.write(
                f"search {self.id}: no trial runs or waits, and the tuner has proposed none for"
                f" {idle:.0f} s; still waiting; the tuner's log: {self.life.dispatcher.path}"
            )

    def next_steps(self, before=""):
        """Return the commands that continue the search, and that show the results so far."""
        what = "fix that and continue" if self.life.tuners_end() else "to continue"
        words = f"{what}: {before}{self.resume}"
        with contextlib.suppress(OSError):
            self.trials.update()  # a trial may have ended just before the search
        if any(trial.has_result for trial in self.trials.known.values()):
            words += f"; results so far: {self.choose}"
        return words

    def death(self):
        """Return a text on the end of a search whose manager has ended."""
        if listed(self.id).get("status") == "STOPPED":
            return f"search {self.id} has been stopped; {self.next_steps()}"
        what = self.life.tuners_end()
        if not what:
            who, words = "NNI's manager has died", self.life.last_words()
            if words and "Tuner closed connection" in words:  # this ends NNI's manager
                who, words = "the tuner has died, and NNI's manager with it", None
            what = f"{who}: {words or NO_WORDS}"
        return f"search {self.id}: {what}; {self.next_steps()}"


class Display:
    """The progress bar and the lines of a search."""

    def __init__(self, config, folder, bar):
        found = direction(config.json(), folder)
        if found is None:
            tqdm.write(UNKNOWN)
        self.best_result, self.bar = min if found == "minimize" else max, bar
        self.notices, self.endings = Notices(config, folder), Endings(config, folder)
        self.results, self.ended, self.late = [], {}, {}
        self.total = config.max_trial_number

    def show(self, known, changed):
        """Show news, given all trials as {ID: trial}, and the changed ones as a list."""
        for line in self.notices.new(known.values()):
            tqdm.write(line)
        late, self.late = self.late, {}
        for trial in [*late.values(), *changed]:
            if trial.status not in ENDED or trial.id in self.ended:
                continue
            is_missing = trial.result is None and trial.reported is None
            if trial.status == "SUCCEEDED" and is_missing and trial.id not in late:
                self.late[trial.id] = trial  # its result may arrive in the next pass
                continue
            self.ended[trial.id] = how = self.endings.short(trial)
            if trial.has_result:
                self.results = [self.best_result([trial.result, *self.results])]
            news = self.endings.news(trial)
            line = f"{title(trial)} {news}" if news else f"{title(trial)}: {how}"
            if self.bar.disable:
                tqdm.write(f"{line}; {self.best()}")
            elif news:
                tqdm.write(line)
        counts = collections.Counter(trial.status.lower() for trial in known.values())
        states = [f"{count} {one_line(state)}" for state, count in counts.items()]
        self.bar.n = len(self.ended)
        self.bar.set_postfix_str(", ".join([self.best(), *states]))

    def best(self):
        if self.results:
            return f"best {self.results[0]:g}"
        return "no result" if len(self.ended) == self.total else "no result yet"

    def end(self):
        """Print if there are no results. Return whether there is a result."""
        if not self.results:
            counts = collections.Counter(self.ended.values())
            how = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
            tqdm.write(f"None of {len(self.ended)} trials has a result: {how or 'none was there'}")
        return bool(self.results)


class Endings:
    """Texts on how trials end."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.said = set()

    def news(self, trial):
        """Return why an ended trial has no result; None if it has one, or this was said before."""
        if trial.has_result or trial.status in ("USER_CANCELED", "SYS_CANCELED"):
            return None
        if trial.status == "FAILED":
            status = exit_status(trial, self.folder)
            why = failure(trial, self.folder)
            if status:
                why += f" (exit status {status})"
            elif is_local(self.config) and not self.config.training_service.reuse_mode:
                why += " (no exit status: was it killed?)"
            if trial.result is not None:
                why += f"; so its result, {trial.result:g}, does not count"
            words = f"has FAILED: {why}"
        elif trial.reported is not None:
            words = f"reported {one_line(trial.reported)}, {NO_RESULT}"
        elif trial.status == "SUCCEEDED":
            words = "has ended without reporting a result"
        else:
            words = f"was {self.short(trial)}"
        if words in self.said:
            return None
        self.said.add(words)
        return words

    def short(self, trial):
        """Return an ended trial's result, or how it has ended without one."""
        if trial.has_result:
            return f"{trial.result:g}"
        if trial.status == "SUCCEEDED":
            reported = trial.reported
            return "without a result" + (f": it reported {one_line(reported)}" if reported else "")
        if trial.status == "EARLY_STOPPED":
            limit = self.config.max_trial_duration
            if limit is not None and (trial.seconds or 0) >= parse_time(limit):
                return f"ended by maxTrialDuration ({limit})"
            return f"ended by {'the assessor' if self.config.assessor else 'the tuner'}"
        if trial.status == "FAILED" and (status := exit_status(trial, self.folder)):
            return f"FAILED with exit status {status}"
        return one_line(trial.status)


def exit_status(trial, folder):
    """Return the exit status of a trial on this machine, or None if it was not noted."""
    try:
        noted = (folder / "trials" / trial.id / ".nni" / "state").read_text()
    except (OSError, ValueError):
        return None
    found = re.match(r"\s*(\d+)\s", noted)
    return int(found[1]) if found else None


class Notices:
    """Lines about a running search, each printed once."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.said = set()
        self.uses_slurm, self.last_query = slurm.is_used(config), 0
        self.manager_log = Log(folder / "log" / "notices.log", 0)

    def new(self, trials):
        """Return the new lines, given all trials."""
        found = {}
        states = {trial.status for trial in trials}
        is_waiting = "WAITING" in states and "RUNNING" not in states
        needs_gpus = self.config.trial_gpu_number and is_local(self.config)
        if is_waiting and needs_gpus and (holders := waiting_for(self.config.training_service)):
            found[holders] = f"trials wait for a GPU: {holders}"
        if self.uses_slurm and "WAITING" in states:
            found |= self.queued(trials)
        for trial in trials:
            if trial.message:
                found[trial.id, trial.message] = f"{title(trial)} is {trial.message}"
        new = {about: line for about, line in found.items() if about not in self.said}
        self.said |= new.keys()
        self.manager_log.text = ""
        self.manager_log.read_on()
        return [*new.values(), *map(one_line, self.manager_log.text.splitlines())]

    def queued(self, trials):
        """Return {state: line} for the first trial in each state in SLURM's queue."""
        if time.monotonic() - self.last_query < ASK:
            return {}
        self.last_query, lines = time.monotonic(), {}
        states = slurm.queue(self.folder.name)
        for trial in trials:
            state = states.get(slurm.job_name(self.folder.name, trial.id))
            if state and trial.status == "WAITING":
                lines.setdefault(state, f"{title(trial)} waits in SLURM's queue: {state}")
        return lines


def title(trial):
    return f"trial {trial.number} ({trial.id})"


def failure(trial, folder):
    """Return why a trial has failed, by its stderr. If that is not here, return where it is."""
    try:
        return one_line(reason(tail(folder / "trials" / trial.id / "stderr")))
    except OSError:
        return f"its files are at {one_line(trial.path or 'no place that NNI knows')}"
