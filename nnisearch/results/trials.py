"""Reads a search's trials and results from NNI's database or from a file."""

import contextlib
import itertools
import json
import math
import signal
import sqlite3
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

from nnisearch.shared.direction import DIRECTIONS, direction
from nnisearch.shared.text import one_line

EXPERIMENTS = Path("~/nni-experiments/.experiment")  # NNI's list of experiments, {ID: {...}}
DATABASE = Path("db", "nni.sqlite")  # in an experiment's folder
EVENTS = (
    "SELECT rowid, trialJobId, sequenceId, event, timestamp, data, logPath, message"
    " FROM TrialJobEvent WHERE rowid > ? AND rowid <= ? AND trialJobId != ''"
    " AND event NOT IN ('ADD_HYPERPARAMETER', 'IMPORT_DATA') ORDER BY rowid LIMIT 1000"
)
METRICS = (
    "SELECT rowid, trialJobId, type, sequence, data FROM MetricData"
    " WHERE rowid > ? AND rowid <= ? ORDER BY rowid LIMIT 1000"
)
NEWEST = "SELECT (SELECT max(rowid) FROM TrialJobEvent), (SELECT max(rowid) FROM MetricData)"
PROFILE = "SELECT id, params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"
ENDED = {"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}
NNIS_NAMES = {"USER_TO_CANCEL": "USER_CANCELED", "ADD_RESUMED": "WAITING"}  # event: status
NO_RESULT = "which is no result; allowed: a finite number, or an object whose default is one"
# Exceptions of a value that NNI has not written.
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)


def number(value):
    """Return a reported value as a finite float, or None if it is no result.

    The value comes from JSON. A result is a number, a NumPy number (which NNI writes as an array
    without dimensions), or an object whose "default" is one of these.
    """
    if isinstance(value, dict) and "default" in value:
        value = value["default"]
    if isinstance(value, dict) and value.get("shape") == []:
        value = value.get("__ndarray__")
    return finite(value)


def finite(value):
    """Return a number as a finite float, else None. As in NNI, true and false are numbers."""
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def read_result(text):
    """Return (result, None) from a result's JSON, or (None, its text) if it is no result."""
    try:
        value = json.loads(text)
    except MALFORMED:
        value = text
    found = number(value)
    if found is not None:
        return found, None
    if isinstance(value, dict) and "__nni_obj__" in value:  # as NNI writes it
        return None, "a Python object, such as a tensor"
    return None, one_line(text if isinstance(text, str) else json.dumps(text), 60)


def read_experiments(**types):
    """Return NNI's list of experiments, {ID: entry}.

    types gives the type that each key of an entry must have. Raises OSError if the list cannot be
    read, and ValueError that names it if it is damaged.
    """
    listed = EXPERIMENTS.expanduser()
    try:
        return checked_list(listed, types) if listed.exists() else {}
    except ValueError as error:
        advice = f"to continue without it: mv '{listed}' '{listed}.damaged'"
        raise ValueError(f"{error}; {advice}; a search is still found by its ID") from None


def checked_list(listed, types):
    """Return the content of NNI's list of experiments. Raises what read_experiments() does."""
    if not listed.is_file():  # reading a pipe would block
        raise ValueError(f"{listed} is damaged: it is no file; allowed: a file, or none")
    if not listed.stat().st_size:
        if any(listed.parent.glob(f"*/{DATABASE}")):  # a power cut can empty the list
            raise ValueError(f"{listed} is damaged: it is empty; allowed: an object of experiments")
        return {}
    known = read_json(listed)
    if not isinstance(known, dict):
        raise ValueError(f"{listed} is damaged; allowed: an object of experiments, or no file")
    for id, one in known.items():
        if not isinstance(one, dict):
            raise ValueError(f"{listed} is damaged: {id} is {one!r}; allowed: an object")
        for key, kind in types.items():
            if not isinstance(one.get(key), kind):
                given = f"{key} is {one.get(key)!r}; allowed: what NNI has written there"
                raise ValueError(f"{listed} is damaged: {id}: {given}")
    return known


def known_ids(experiments):
    """Return a text with up to five IDs of experiments."""
    words = ", ".join([*experiments][-5:]) or "none, since NNI lists no experiment"
    return words + (", and others in nnictl experiment list --all" if len(experiments) > 5 else "")


def find_folder(experiment, known):
    """Return the folder of an experiment, or None if there is none.

    known is NNI's list. If the list lacks the experiment, or both have been moved, the folder is
    found beside the list.
    """
    listed = Path(known[experiment]["logDir"], experiment) if experiment in known else None
    if listed and (listed / DATABASE).is_file():
        return listed
    beside = EXPERIMENTS.expanduser().with_name(Path(experiment).name)
    is_beside = beside.name == experiment and (beside / DATABASE).is_file()
    return beside if is_beside else listed


def find_database(experiment):
    """Return the path of an experiment's database, by default of the latest experiment.

    Raises ValueError if there is no such experiment, OSError if NNI's list cannot be read.
    """
    if experiment and (folder := find_folder(experiment, {})):
        return folder / DATABASE
    known = read_experiments(startTime=(int, float), logDir=str)
    if not known:
        listed = EXPERIMENTS.expanduser()
        raise ValueError(f"no experiment: {listed} lists none; --file reads a search's folder, too")
    if experiment is None:
        experiment = max(known, key=lambda key: known[key]["startTime"])
    if folder := find_folder(experiment, known):
        return folder / DATABASE
    raise ValueError(f"EXPERIMENT_ID is {experiment!r}; allowed: {known_ids(known)}")


@contextlib.contextmanager
def open_database(path):
    """Open NNI's database; yield a function that returns the rows of a query.

    NNI cannot write during a query, so queries are short and Ctrl-Z waits for their end. Raises
    OSError that names the file if it is not a database of NNI 2.10, or is locked for 5 seconds.
    """

    def rows(query, values=()):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
        try:
            return database.execute(query, values).fetchall()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        # rw creates no file, and can roll back a transaction that a killed manager has left.
        address = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            yield rows
    except (sqlite3.Error, *MALFORMED) as error:
        raise OSError(f"cannot read {path}: {one_line(error)}") from error


def read_on(rows, query, last, newest):
    """Yield a query's rows after row last, up to row newest."""
    while batch := rows(query, [last, newest or 0]):
        yield from batch
        last = batch[-1][0]


@dataclass
class Trial:
    """A trial of a search.

    result is a number or None. reported is the text of a reported value that is no result, or None.
    start and end are in ms since 1970. path is the URL of the trial's folder. message says why the
    trial was run again.
    """

    number: int
    id: str
    status: str = "WAITING"
    result: float | None = None
    reported: str | None = None
    intermediate: list = field(default_factory=list)
    hyperparameters: object = field(default_factory=dict)
    seconds: float | None = None
    start: int = 0
    end: int | None = None
    path: str = ""
    message: str | None = None

    @property
    def has_result(self):
        """Whether the trial counts: it has ended by itself and reported a result."""
        return self.status == "SUCCEEDED" and self.result is not None

    @property
    def last(self):
        """The last of the intermediate results, or None."""
        return self.intermediate[-1] if self.intermediate else None

    @property
    def area(self):
        """The area under the curve of the intermediate results, of width 1: their mean, or None."""
        values = self.intermediate
        return sum(values) / len(values) if values and None not in values else None

    def as_json(self):
        """Return the trial as --json prints it."""
        return {"trial": self.number} | {key: getattr(self, key) for key in KEYS[1:]}


KEYS = ("trial", "id", "status", "result", "reported", "intermediate", "hyperparameters")
KEYS += ("seconds", "last", "area")  # of a trial in JSON


def duration(seconds):
    """Return seconds, or None if they are negative because the clock was set back."""
    return seconds if seconds is not None and seconds >= 0 else None


class Trials:
    """The trials in NNI's database, known as {ID: Trial}; update() only reads what is new."""

    def __init__(self, path):
        self.path = path
        self.known, self.reports = {}, {}
        self.last_event = self.last_metric = 0
        self.early = []  # metrics that NNI has stored before the trial's first event

    def update(self):
        """Read what is new; return the changed trials. Raises what open_database() does."""
        changed = {}
        with open_database(self.path) as rows:
            # One query for both, so that the trial of each metric is known.
            ((last_event, last_metric),) = rows(NEWEST)
            for row, id, *event in read_on(rows, EVENTS, self.last_event, last_event):
                changed[id] = self.note_event(id, *event)
                self.last_event = row
            early, self.early = self.early, []
            metrics = read_on(rows, METRICS, self.last_metric, last_metric)
            for row, id, *metric in itertools.chain(early, metrics):
                if id in self.known:
                    changed[id] = self.note_metric(id, *metric)
                else:
                    self.early.append((row, id, *metric))
                self.last_metric = max(row, self.last_metric)
        for id, trial in changed.items():
            reports = sorted(self.reports[id], key=lambda report: report[0])
            trial.intermediate = [value for _, value in reports]
        return list(changed.values())

    def note_event(self, id, sequence, event, time, data, path, message):
        trial = self.known.setdefault(id, Trial(sequence, id))
        self.reports.setdefault(id, [])
        trial.status = NNIS_NAMES.get(event, event)
        trial.path = path or trial.path
        trial.message = message or trial.message
        if event == "WAITING" and data:
            trial.hyperparameters = json.loads(data)["parameters"]
        elif event == "WAITING":
            # The trial is run again: its reports are deleted, and SQLite reuses their row numbers.
            self.reports = {known: [] for known in self.reports}
            self.last_metric, self.early = 0, []
        if trial.status not in ENDED:  # WAITING, too: NNI may miss RUNNING
            trial.start = time
            trial.end = trial.seconds = None
        elif trial.end is None:
            trial.end = time
            trial.seconds = None if time is None else duration((time - trial.start) / 1000)
        return trial

    def note_metric(self, id, kind, sequence, data):
        trial = self.known[id]
        value, other = read_result(json.loads(data))
        if kind != "FINAL":
            self.reports[id].append((sequence, value))
        elif trial.result is None and trial.reported is None:  # as in NNI, the first one counts
            trial.result, trial.reported = value, other
        return trial


def read_database(path):
    """Return the search in NNI's database: experiment, name, command, direction and trials.

    The direction is None if it is unknown. Raises what open_database() does.
    """
    with open_database(path) as rows:
        ((experiment, params),) = rows(PROFILE)
        profile = json.loads(params)
        search = {
            "experiment": experiment,
            "name": profile.get("experimentName"),
            "command": profile.get("trialCommand"),
            "direction": direction(profile, path.absolute().parents[1]),
        }
    trials = Trials(path)
    trials.update()
    return search | {"trials": [*trials.known.values()]}


def read_file(path):
    """Return the search in an experiment's folder, NNI's database, or JSON of --json or nnictl.

    nnictl only exports trials with a result, without duration and direction; intermediate results
    need its -i. Raises OSError or ValueError that names the file.
    """
    path = path / DATABASE if path.is_dir() else path
    if path.suffix == DATABASE.suffix:
        return read_database(path)
    search = read_json(path)
    try:
        is_export = not isinstance(search, dict)
        about = {"experiment": None, "name": path.name, "command": None} if is_export else search
        found = {key: about[key] for key in ("experiment", "name", "command")}
        found["direction"] = about.get("direction")
        if found["direction"] not in (None, *DIRECTIONS):
            raise ValueError(f"direction is {found['direction']!r}; allowed: {DIRECTIONS}")
        if is_export:
            trials = [exported(order, trial) for order, trial in enumerate(search)]
        else:
            trials = [imported(trial) for trial in search["trials"]]
        return found | {"trials": trials}
    except MALFORMED as error:
        is_missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if is_missing else f"{type(error).__name__}: {error}"
        what = f"{path} holds no results of --json or of nnictl's export as JSON"
        raise ValueError(f"{what}: {one_line(reason)}") from error


def exported(order, trial):
    """Return the Trial in an entry of nnictl's export, whose results are JSON in JSON."""
    result, reported = read_result(trial["value"])
    # The last intermediate one repeats the result.
    reports = [read_result(text)[0] for text in trial.get("intermediate", [])[:-1]]
    given = trial["parameter"]
    return Trial(order, str(trial["trialJobId"]), "SUCCEEDED", result, reported, reports, given)


def imported(trial):
    """Return the Trial in an entry of --json, with values of the right types."""
    return Trial(
        int(trial["trial"]),
        str(trial["id"]),
        str(trial["status"]),
        number(trial["result"]),
        trial.get("reported"),
        [number(value) for value in trial["intermediate"]],
        trial["hyperparameters"],
        duration(number(trial["seconds"])),
    )


def read_json(path):
    """Return the content of a JSON file. Raises OSError or ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
