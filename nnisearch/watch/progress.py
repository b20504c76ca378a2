"""Shows a running search: a progress bar, or one line per trial without a terminal.

It prints once what a user should know, such as why a trial has failed or what trials wait for. It
ends when the search cannot continue. Each pass only reads new events, so its cost does not grow
with the number of trials.
"""

import collections
import contextlib
import math
import threading
import time
from pathlib import Path

from nni.experiment import rest
from tqdm import tqdm

from nnisearch.before.config import is_local
from nnisearch.before.gpus import waiting_for
from nnisearch.elsewhere import slurm
from nnisearch.results.database import Trials
from nnisearch.results.trials import ENDED
from nnisearch.shared.direction import direction, explanation
from nnisearch.shared.text import one_line
from nnisearch.watch.endings import Endings
from nnisearch.watch.liveness import Liveness, Log

# tqdm's default lock is for several processes, and starts another process in Python 3.14.
tqdm.set_lock(threading.RLock())

SILENCE = 20  # s without an answer of the manager until a line says so
IDLE = 60  # s without a trial and without a proposal of the tuner until a line says so
ASK = 10  # s between two queries to SLURM's controller, which serves other users, too
QUIET = 6  # s: longer than the pause of NNI's loop that starts waiting trials


def watch(id, port, config, resume, choose):
    """Show a search until all its trials have ended; return whether a trial has a result.

    resume and choose are the commands that continue the search and show its results. Raises
    RuntimeError if the search ends in another way.
    """
    folder = Path(config.experiment_working_directory, id)
    total = config.max_trial_number
    with tqdm(total=total, unit="trial", disable=None, dynamic_ncols=True) as bar:
        search = Watched(id, port, folder, resume, choose)
        tqdm.write(explanation(config.json(), folder, choose))
        display = Display(config, folder, bar)
        try:
            while not show_once(search, display):
                time.sleep(1)
        except SystemExit:  # by SIGTERM or SIGHUP
            tqdm.write(f"The search continues. To watch it again: {resume}")
            raise
        return display.end()


def show_once(search, display):
    """Show what has changed in a search; return whether it is done. Raises what watch() does."""
    status, changed = search.ask()
    if status is None:
        return False
    if any(trial.status in ENDED for trial in changed):  # nnictl may have changed the number
        total = search.profile().get("params", {}).get("maxTrialNumber")
        display.bar.total = total or display.bar.total
    display.show(search.trials.by_id, changed)
    if search.is_done(status) and not display.late:
        if line := search.shortfall(status):
            tqdm.write(line)
        return True
    search.check(status)
    return False


class Watched:
    """A watched search: its state and its trials; notices when it cannot continue."""

    def __init__(self, id, port, folder, resume, choose):
        self.id, self.port, self.resume, self.choose = id, port, resume, choose
        self.trials = Trials(folder / "db" / "nni.sqlite")
        self.liveness = Liveness(id, folder)
        self.heard = self.changed = time.monotonic()  # when it last answered, and last changed
        self.is_silent = self.is_idle = False

    def ask(self):
        """Return the manager's status and the trials that have changed.

        Returns None and [] if one of the two cannot be read now. Raises RuntimeError if the manager
        has ended.
        """
        status = problem = None
        try:
            status = rest.get(self.port, "/check-status")
            changed = self.trials.update()
        except OSError as error:
            problem = error
        silence = time.monotonic() - self.heard
        is_gone = status is None and self.liveness.manager is None and silence > SILENCE
        if self.liveness.is_over() or is_gone:  # somebody else may have its port now
            raise RuntimeError(self.death())
        if problem:
            self.tell_silence(silence, problem)
            return None, []
        self.heard, self.is_silent = time.monotonic(), False
        if changed:
            self.changed, self.is_idle = self.heard, False
        return status, changed

    def tell_silence(self, silence, problem):
        """Print once that the search has not answered for SILENCE seconds."""
        if silence > SILENCE and not self.is_silent:
            self.is_silent = True
            how_long = f"has not answered for {silence:.0f} s; still waiting"
            tqdm.write(f"search {self.id} {how_long}: {one_line(problem)}")

    def is_done(self, status):
        """Return whether all trials have ended and no more will start."""
        if self.has_unended():
            return False
        if status["status"] == "DONE":
            return True
        if status["status"] != "TUNER_NO_MORE_TRIAL" or time.monotonic() - self.changed < QUIET:
            return False
        started = [trial.number for trial in self.trials.by_id.values()]
        following = self.profile().get("nextSequenceId", math.inf)
        return following <= 1 + max(started, default=-1)  # no trial is queued

    def has_unended(self):
        return any(trial.status not in ENDED for trial in self.trials.by_id.values())

    def profile(self):
        """Return NNI's profile of the search, {} if the manager does not answer."""
        try:
            return rest.get(self.port, "/experiment")
        except OSError:
            return {}

    def shortfall(self, status):
        """Return why a search has ended before maxTrialNumber trials, "" if it has not."""
        params = self.profile().get("params", {})  # nnictl may have changed them
        limit, asked = params.get("maxExperimentDuration"), params.get("maxTrialNumber") or 0
        ended = len(self.trials.by_id)
        if ended >= asked:
            return ""
        passed = f"maxExperimentDuration is {limit}, and has passed"
        why = passed if status["status"] == "DONE" else "The tuner has no more"
        return f"{why} after {ended} trials; maxTrialNumber is {asked}"

    def check(self, status):
        """Raise RuntimeError if the search cannot continue. It says why, and how to continue."""
        if status["status"] in ("STOPPING", "STOPPED"):
            raise RuntimeError(f"search {self.id} has been stopped; {self.next_steps()}")
        is_dead = self.liveness.tuner_is_dead()
        if is_dead or status["status"] == "ERROR":
            how = self.next_steps(f"nnictl stop {self.id}; ")
            who = "the tuner has died" if is_dead else "NNI's manager has given up"
            why = self.liveness.why(who, status["errors"])
            raise RuntimeError(f"search {self.id}: {why}; {how}")
        idle = time.monotonic() - self.changed
        if idle > IDLE and not self.has_unended() and not self.is_idle:
            self.is_idle = True
            tqdm.write(
                f"search {self.id}: no trial runs or waits, and the tuner has proposed none for"
                f" {idle:.0f} s; still waiting; the tuner's log: {self.liveness.dispatcher.path}"
            )

    def next_steps(self, before=""):
        """Return the commands that continue the search, and that show the results so far."""
        what = "fix that and continue" if self.liveness.fatal_entries() else "to continue"
        words = f"{what}: {before}{self.resume}"
        with contextlib.suppress(OSError):
            self.trials.update()  # a trial may have ended just before the search
        if any(trial.has_result for trial in self.trials.by_id.values()):
            words += f"; results so far: {self.choose}"
        return words

    def death(self):
        """Return a text on the end of a search whose manager has ended."""
        if self.liveness.is_stopped():
            return f"search {self.id} has been stopped; {self.next_steps()}"
        why = self.liveness.why("NNI's manager has died")
        return f"search {self.id}: {why}; {self.next_steps()}"


class Display:
    """The progress bar and the lines of a search."""

    def __init__(self, config, folder, bar):
        is_minimized = direction(config.json(), folder) == "minimize"
        self.best_result, self.bar = min if is_minimized else max, bar
        self.notices, self.endings = Notices(config, folder), Endings(config, folder)
        self.results, self.ended, self.late = [], {}, {}

    def show(self, trials, changed):
        """Show news, given all trials as {ID: trial}, and the changed ones as a list."""
        for line in self.notices.new(trials.values()):
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
            line = f"{trial.title()} {news}" if news else f"{trial.title()}: {how}"
            if self.bar.disable:
                tqdm.write(f"{line}; {self.best()}")
            elif news:
                tqdm.write(line)
        counts = collections.Counter(trial.status.lower() for trial in trials.values())
        states = [f"{count} {one_line(state)}" for state, count in counts.items()]
        self.bar.n = len(self.ended)
        self.bar.set_postfix_str(", ".join([self.best(), *states]))

    def best(self):
        if self.results:
            return f"best {self.results[0]:g}"
        return "no result" if len(self.ended) == self.bar.total else "no result yet"

    def end(self):
        """Print if there are no results. Return whether there is a result."""
        if not self.results:
            counts = collections.Counter(self.ended.values())
            how = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
            tqdm.write(f"None of {len(self.ended)} trials has a result: {how or 'none was there'}")
        return bool(self.results)


class Notices:
    """Lines about a running search, each printed once."""

    def __init__(self, config, folder):
        self.config, self.id = config, folder.name
        self.printed = set()
        self.uses_slurm, self.last_query = slurm.is_used(config), 0
        self.log = Log(folder / "log" / "notices.log", 0)  # by the manager

    def new(self, trials):
        """Return the new lines, given all trials."""
        lines = {}  # by what they are about
        states = {trial.status for trial in trials}
        is_waiting = "WAITING" in states and "RUNNING" not in states
        needs_gpus = self.config.trial_gpu_number and is_local(self.config)
        if is_waiting and needs_gpus and (holders := waiting_for(self.config.training_service)):
            lines[holders] = f"trials wait for a GPU: {holders}"
        if self.uses_slurm and "WAITING" in states and time.monotonic() - self.last_query >= ASK:
            self.last_query = time.monotonic()
            queue = slurm.queue(self.id)
            for trial in trials:
                state = queue.get(slurm.job_name(self.id, trial.id))
                if state and trial.status == "WAITING":
                    lines.setdefault(state, f"{trial.title()} waits in SLURM's queue: {state}")
        new = [line for about, line in lines.items() if about not in self.printed]
        self.printed |= lines.keys()
        self.log.text = ""
        self.log.read_on()
        return [*new, *map(one_line, self.log.text.splitlines())]
