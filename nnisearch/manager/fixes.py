"""Fixes faults of NNI in the tuner's process, each change with its reason.

dispatcher.py loads this file outside of its package, so it must not import nnisearch.
"""

import collections
import contextlib
import functools
import json
import logging
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import websockets
from nni.algorithms.hpo.batch_tuner import BatchTuner
from nni.common import dump, load
from nni.common.hpo_utils import format_parameters, format_search_space, validate_search_space
from nni.runtime import msg_dispatcher, msg_dispatcher_base
from nni.runtime.tuner_command_channel import CommandType, channel, websocket
from nni.tools import package_utils
from nni.tuner import Tuner

log = logging.getLogger("nni.fixes")  # the logger nni writes to dispatcher.log
create = package_utils.create_builtin_class_instance
run = msg_dispatcher_base.MsgDispatcherBase.run
CODE = {"__symbol__", "__nni_type__", "__nni_obj__", "__enum__"}  # keys that NNI's load() runs
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)  # what NNI raises for odd data
SPACE_REFUSED = SimpleNamespace(value=b"RS")  # a message to manager.js, with the space that stays


def apply(connection):
    """Change NNI before it starts; connection is the socket to the manager."""
    use_only(connection)
    msg_dispatcher.MsgDispatcher = Dispatcher
    msg_dispatcher_base.MsgDispatcherBase.enqueue_command = enqueue_in_order
    package_utils.create_builtin_class_instance = create_with_memory
    msg_dispatcher_base.MsgDispatcherBase.run = prepare_and_run


def create_with_memory(*arguments):
    """Create one of NNI's own tuners or assessors, with a method that creates it anew."""
    algorithm = create(*arguments)
    algorithm.make_anew = functools.partial(create_with_memory, *arguments)
    return algorithm


def prepare_and_run(dispatcher):
    """Run the dispatcher or the advisor; its tuner and assessor exist by now."""
    note_direction(getattr(dispatcher, "tuner", dispatcher))
    run(dispatcher)


def use_only(connection):
    """Let NNI use only this socket, and end when the socket closes.

    By itself NNI connects to a port, and again after a lost connection. By then another user may
    have the port, and could run any command here.
    """

    async def connect(url):
        # No pings: a socket pair does not break silently, and a manager may be suspended.
        how = {"max_size": None, "open_timeout": None, "ping_interval": None}
        return await websockets.connect(url, sock=connection, **how)

    def end(*_):
        log.error("The manager has closed the connection.")
        os._exit(1)  # sys.exit() would wait for other threads

    websocket._connect_async = connect
    channel.TunerCommandChannel._retry_send = channel.TunerCommandChannel._retry_receive = end


def enqueue_in_order(advisor, command, data):
    """Run all of an advisor's commands in one thread. NNI handles a trial's end in a second one."""
    advisor.default_command_queue.put((command, data))


class Dispatcher(msg_dispatcher.MsgDispatcher):
    """NNI's dispatcher, which tells the tuner of each trial once and in order.

    - The tuner runs in one thread. By itself NNI reports a trial's end in the assessor's thread, at
      any moment, and most tuners fail if a result comes after its trial's end.
    - A tuner that starts anew in a resumed search does not repeat what was tried before.
    - What is no report, and a search space that cannot be searched, does not end the tuner.
    - NNI's own tuners do not get data that they fail on: results that are no finite numbers or do
      not fit the search space, and trials that the user has added.
    """

    def __init__(self, url, tuner, assessor=None):
        super().__init__(url, tuner, assessor)
        self.is_nnis = type(tuner).__module__.startswith("nni.algorithms.")
        # A user's own tuner may continue by itself, and repeat a set on purpose.
        has_checkpoint = type(tuner).load_checkpoint is not Tuner.load_checkpoint
        self.starts_anew = hasattr(tuner, "make_anew") and not has_checkpoint
        self.given_space = self.space = None  # the configuration's, and in NNI's own format
        self.ended = set()  # IDs of trials
        self.told = set()  # (trial's ID, parameter ID) of the results that the tuner knows
        self.results = []  # in the form of import_data()
        self.given_out = collections.Counter()  # how often each set of parameters was given out
        self.to_skip = collections.Counter()  # how many repetitions of each set are still to come

    def enqueue_command(self, command, data):
        is_intermediate = command is CommandType.ReportMetricData and data["type"] == "PERIODICAL"
        if is_intermediate or command is CommandType.TrialEnd:
            self.assessor_command_queue.put((command, data))
        if not is_intermediate:
            self.default_command_queue.put((command, data))

    def process_command(self, command, data):
        in_assessors_thread = threading.current_thread() is self.assessor_worker
        if command is CommandType.TrialEnd and in_assessors_thread:
            self.tell_assessor_of_end(data)
        else:
            super().process_command(command, data)

    def tell_assessor_of_end(self, data):
        trial = data["trial_job_id"]
        msg_dispatcher._ended_trials.add(trial)
        if msg_dispatcher._trial_history.pop(trial, None) is not None:
            self.assessor.trial_end(trial, data["event"] == "SUCCEEDED")

    def handle_trial_end(self, data):
        trial, id = data["trial_job_id"], json.loads(data["hyper_params"])["parameter_id"]
        self.ended.add(trial)
        if id is None or self.is_created_in_previous_exp(id):
            return  # this tuner has not proposed it
        # NNI's own tuners fail on a failed trial with a result, and ignore a success without one.
        has_result = (trial, id) in self.told
        self.tuner.trial_end(id, has_result if self.is_nnis else data["event"] == "SUCCEEDED")

    def is_created_in_previous_exp(self, param_id):
        return param_id is not None and super().is_created_in_previous_exp(param_id)

    def handle_report_metric_data(self, data):
        trial, id = data["trial_job_id"], data["parameter_id"]
        try:
            value = read(data["value"])
        except ValueError as error:
            say(f"trial {trial}: a report is left out: {error}")
            return
        if data["type"] == "PERIODICAL":  # from rerun trials of a resumed search, too
            self._handle_intermediate_metric_data(data | {"value": value})
        elif trial in self.ended or (trial, id) in self.told:
            log.warning("trial %s: a result after its end, or a second one, is left out", trial)
        else:
            self.tell_result(trial, id, value)

    def tell_result(self, trial, id, value):
        value = scalar(value) if self.is_nnis else value
        if value is None and self.is_nnis:
            log.warning("trial %s: its result is no finite number", trial)
            return
        self.told.add((trial, id))
        if self.is_created_in_previous_exp(id):
            self.learn([{"parameter": self.get_previous_param(id), "value": value}])
            return
        if parameters := msg_dispatcher._trial_params.get(id):  # otherwise the user has added it
            self.results.append({"parameter": parameters, "value": value})
        metric = {"parameter_id": id, "trial_job_id": trial, "value": value}
        self._handle_final_metric_data(metric)

    def handle_initialize(self, data):
        self.given_space, self.space = data, formatted(data)
        super().handle_initialize(data)

    def handle_update_search_space(self, data):
        """Search another space from now on; keep the old one if the tuner cannot search it."""
        make_anew = getattr(self.tuner, "make_anew", None)
        try:
            if make_anew:
                check_space(data, make_anew())
            tuner = make_anew() if make_anew else self.tuner
            tuner.update_search_space(data)
        except Exception as error:  # NNI's and the users' tuners raise all kinds
            log.exception("the tuner refuses the new search space")
            say(f"the new search space is refused, and the old one stays: {error!r}")
            self.send(SPACE_REFUSED, dump(self.given_space))
            return
        self.given_space, self.space = data, formatted(data)
        if make_anew:  # NNI's own tuners confuse the old space with the new one
            self.tuner = tuner
            self.recovered_max_param_id = msg_dispatcher._next_parameter_id - 1
            self.recovered_trial_params |= msg_dispatcher._trial_params
            self.to_skip = self.given_out.copy()
            results, self.results = self.results, []
            self.learn(results)

    def handle_request_trial_jobs(self, data):
        """Give out this number of sets of parameters, and skip those that were given out before."""
        missing, is_short = data, False
        while missing:
            ids = [msg_dispatcher._create_parameter_id() for _ in range(missing)]
            send = self.send_trial_callback
            sets = self.tuner.generate_multiple_parameters(ids, st_callback=send)
            is_short |= len(sets) < missing
            missing = 0
            for id, parameters in zip(ids, sets, strict=False):
                if self.to_skip[text := as_text(parameters)]:
                    self.to_skip[text] -= 1
                    self.tuner.trial_end(id, False)
                    missing += 1
                else:
                    send(id, parameters)
        if is_short:
            self.send(CommandType.NoMoreTrialJobs, dump({"parameter_id": ids[0]}))

    def send_trial_callback(self, id_, params):
        self.given_out[as_text(params)] += 1
        super().send_trial_callback(id_, params)

    def handle_add_customized_trial(self, data):
        """Note all trials of a resumed search, whatever their status."""
        super().handle_add_customized_trial(data)
        if not self.starts_anew:
            return
        own = [trial for trial in data if trial["parameter_id"] is not None]  # not the user's
        self.given_out.update(as_text(trial["parameters"]) for trial in own)
        self.to_skip |= self.given_out

    def handle_import_data(self, data):
        for record in data:
            if isinstance(record, dict) and isinstance(record.get("value"), str):
                with contextlib.suppress(ValueError):  # then it stays text
                    record["value"] = read(record["value"])
        # BatchTuner's import_data() ignores a 0, and forgets the sets that it has proposed.
        if isinstance(self.tuner, BatchTuner):
            self.to_skip.update(as_text(record["parameter"]) for record in filter(self.fits, data))
        else:
            self.learn(data)

    def learn(self, records):
        """Give results in the form of import_data() to the tuner; filter them for NNI's tuners."""
        if self.is_nnis:
            fitting = list(filter(self.fits, records))
            if left_out := len(records) - len(fitting):
                log.warning("%d of %d results left out: they do not fit", left_out, len(records))
            # NNI's own tuners mistake a plain 0 for a missing result.
            records = [
                {"parameter": r["parameter"], "value": scalar(r["value"]) or {"default": 0}}
                for r in fitting
            ]
        self.results += records
        if not isinstance(self.tuner, BatchTuner):
            self.tuner.import_data(records)

    def fits(self, record):
        """Return whether one of NNI's own tuners can learn from a result."""
        try:
            if self.space is not None and not isinstance(self.tuner, BatchTuner):
                format_parameters(record["parameter"], self.space)
            return "parameter" in record and scalar(record["value"]) is not None
        except UNREADABLE:
            return False


def say(line):
    """Add a line for the user, which progress.py prints."""
    with open(Path(os.environ["NNI_LOG_DIRECTORY"], "notices.log"), "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read(text):
    """Return NNI's load() of a text; raise ValueError if it is no data, or nested too deeply."""
    try:
        json.loads(text, object_hook=refuse_code)
        return load(text)
    except Exception as error:  # load() raises all kinds
        raise ValueError(f"{text[:60]!r}: {error}") from error


def refuse_code(pairs):
    if code := CODE & pairs.keys():
        raise ValueError(f"{min(code)} is code; allowed: data")


def check_space(space, tuner):
    """Raise an error if one of NNI's own tuners, a new one, cannot search this space."""
    # NNI's check refuses a choice of lists or None, which its tuners can search.
    numbers = {name: spec for name, spec in space.items() if spec["_type"] != "choice"}
    validate_search_space(numbers, raise_exception=True)
    tuner.update_search_space(space)
    dump(tuner.generate_multiple_parameters([0]), allow_nan=False)


def scalar(value):
    """Return a result, or an object's "default", as a finite number; None if there is none."""
    value = value.get("default") if isinstance(value, dict) else value
    value = value.item() if getattr(value, "shape", None) == () else value  # a NumPy number
    try:
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def formatted(space):
    """Return a search space in the format of NNI's own tuners, None if they cannot read it."""
    try:
        return format_search_space(space)
    except UNREADABLE:
        return None


def as_text(parameters):
    """Return parameters as text for comparison: 1.0 equals 1, since JavaScript writes 1."""
    return json.dumps(json.loads(dump(parameters), parse_int=float), sort_keys=True)


def note_direction(tuner):
    """Write the tuner's optimize_mode to a file for direction.py, "" if it has none."""
    mode = getattr(tuner, "optimize_mode", None) or getattr(tuner, "_optimize_mode", None)  # GP's
    said = str(getattr(mode, "value", mode) or "")
    Path(os.environ["NNI_LOG_DIRECTORY"], "direction").write_text(said, encoding="utf-8")
