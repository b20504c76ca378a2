"""Reads a search's trials from NNI's database."""

import contextlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from nnisearch.results.trials import ENDED, MALFORMED, Trial, duration, read_result
from nnisearch.shared.direction import direction
from nnisearch.shared.text import one_line

DATABASE = Path("db", "nni.sqlite")  # in an experiment's folder
EVENTS = (
    "SELECT rowid, trialJobId, sequenceId, event, timestamp, data FROM TrialJobEvent"
    " WHERE rowid > ? AND rowid <= ? AND trialJobId != ''"
    " AND event NOT IN ('ADD_HYPERPARAMETER', 'IMPORT_DATA') ORDER BY rowid LIMIT 1000"
)
METRICS = (
    "SELECT rowid, trialJobId, type, sequence, data FROM MetricData"
    " WHERE rowid > ? AND rowid <= ? ORDER BY rowid LIMIT 1000"
)
NEWEST = "SELECT (SELECT max(rowid) FROM TrialJobEvent), (SELECT max(rowid) FROM MetricData)"
PROFILE = "SELECT id, params FROM ExperimentProfile ORDER BY revision DESC LIMIT 1"
NNIS_NAMES = {"USER_TO_CANCEL": "USER_CANCELED", "ADD_RESUMED": "WAITING"}  # event: status


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Callable]:
    """Open NNI's database; yield a function that returns the rows of a query.

    NNI cannot write during a query, so queries are short. Raises OSError that names the file if it
    is not a database of NNI 2.10, or is locked for 5 seconds.
    """
    try:
        # rw creates no file, and can roll back a transaction that a killed manager has left.
        address = f"{path.absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            yield lambda query, values=(): database.execute(query, values).fetchall()
    except (sqlite3.Error, *MALFORMED) as error:
        raise OSError(f"cannot read {path}: {one_line(error)}") from error


def read_on(rows: Callable, query: str, last: int, newest: int | None) -> Iterator[tuple]:
    """Yield a query's rows after row last, up to row newest."""
    while batch := rows(query, [last, newest or 0]):
        yield from batch
        last = batch[-1][0]


class Trials:
    """The trials in NNI's database, {ID: Trial} in by_id; update() only reads what is new."""

    def __init__(self, path: Path):
        self.path = path
        self.by_id: dict[str, Trial] = {}
        self.reports: dict[str, list[tuple]] = {}  # (sequence, value)
        self.last_event = self.last_metric = 0
        self.early = []  # metrics that NNI has stored before the trial's first event

    def update(self) -> list[Trial]:
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
                if id in self.by_id:
                    changed[id] = self.note_metric(id, *metric)
                else:
                    self.early.append((row, id, *metric))
                self.last_metric = max(row, self.last_metric)
        for id, trial in changed.items():
            reports = sorted(self.reports[id], key=lambda report: report[0])
            trial.intermediate = [value for _, value in reports]
        return list(changed.values())

    def note_event(
        self, id: str, sequence: int, event: str, time: int | None, data: str | None
    ) -> Trial:
        trial = self.by_id.setdefault(id, Trial(sequence, id))
        self.reports.setdefault(id, [])
        had_ended = trial.status in ENDED
        trial.status = NNIS_NAMES.get(event, event)
        if event == "WAITING" and data:
            trial.hyperparameters = json.loads(data)["parameters"]
        elif event == "WAITING":
            # The trial is run again: its reports are deleted, and SQLite reuses their row numbers.
            self.reports = {id: [] for id in self.reports}
            self.last_metric, self.early = 0, []
        if trial.status not in ENDED:  # WAITING, too: NNI may miss RUNNING
            trial.start, trial.seconds = time, None
        elif not had_ended:
            trial.seconds = duration((time - trial.start) / 1000)
        return trial

    def note_metric(self, id: str, kind: str, sequence: int, data: str) -> Trial:
        trial = self.by_id[id]
        value, other = read_result(json.loads(data))
        if kind != "FINAL":
            self.reports[id].append((sequence, value))
        elif trial.result is None and trial.reported is None:  # as in NNI, the first one counts
            trial.result, trial.reported = value, other
        return trial


def read_database(path: Path) -> dict:
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
    return search | {"trials": [*trials.by_id.values()]}
