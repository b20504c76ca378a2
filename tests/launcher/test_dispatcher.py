"""fixes.py in NNI's own dispatcher, without a manager: the tuner hears of each trial correctly."""

import json
import threading

import numpy as np
import pytest
from nni.runtime import msg_dispatcher
from nni.runtime.tuner_command_channel import CommandType
from nni.tuner import Tuner

from nnisearch.manager import fixes
from nnisearch.tuners import OptunaTuner

SPACE = {
    "x": {"_type": "choice", "_value": [0, 1, 2]},
    "y": {"_type": "choice", "_value": [0.0, 1.0]},
}
SETS = [{"x": x, "y": float(y)} for x in (0, 1, 2) for y in (0, 1)]
SEQUENCE = {"x": {"_type": "uniform", "_value": [0, 1]}}
NORMAL = {"_type": "normal", "_value": [0, 1]}
BATCH = {"combine_params": {"_type": "choice", "_value": [*SETS[:3], SETS[0]]}}  # one set twice


@pytest.fixture(autouse=True)
def notices(tmp_path, monkeypatch):
    """The file of the lines for the user."""
    monkeypatch.setenv("NNI_LOG_DIRECTORY", str(tmp_path))
    return tmp_path / "notices.log"


class Search:
    """A dispatcher, and what it has sent to the manager; trial N has the ID "trial N"."""

    def __init__(self, tuner, space=SPACE, assessor=None, lives=0):
        self.given, self.other = [], []
        msg_dispatcher._next_parameter_id = 0
        msg_dispatcher._trial_params.clear()
        msg_dispatcher._ended_trials.clear()
        self.dispatcher = fixes.Dispatcher("ws://_unittest_", tuner, assessor)
        self.dispatcher.send = self.receive
        self.tell(CommandType.Initialize, space)

    def receive(self, command, data):
        if command is CommandType.NewTrialJob:
            self.given.append(json.loads(data))
        else:
            self.other.append((command, data))

    def tell(self, command, data):
        self.dispatcher.process_command(command, json.loads(json.dumps(data)))

    def ask(self, number=1):
        """Return the sets of parameters that the tuner gives out."""
        before = len(self.given)
        self.tell(CommandType.RequestTrialJobs, number)
        return [job["parameters"] for job in self.given[before:]]

    def metric(self, job, value, kind="FINAL", sequence=0):
        id = job["parameter_id"]
        return {
            "trial_job_id": f"trial {id}",
            "parameter_id": id,
            "type": kind,
            "sequence": sequence,
            "value": json.dumps(value),
        }

    def report(self, job, value):
        self.tell(CommandType.ReportMetricData, self.metric(job, value))

    def end(self, job, event="SUCCEEDED"):
        self.tell(CommandType.TrialEnd, self.trial_end(job, event))

    def trial_end(self, job, event):
        id = f"trial {job['parameter_id']}"
        return {"trial_job_id": id, "event": event, "hyper_params": json.dumps(job)}

    def resumed(self, tuner, results, space=SPACE):
        """Return this search resumed with a new tuner; results are those of the first trials."""
        search = Search(tuner, space)
        jobs = [job | {"parameters": as_javascript(job["parameters"])} for job in self.given]
        finished = [
            {"parameter": job["parameters"], "value": json.dumps(value)}
            for job, value in zip(jobs, results, strict=False)
        ]
        search.tell(CommandType.ImportData, finished)
        search.tell(CommandType.AddCustomizedTrialJob, jobs)
        search.given = jobs
        return search


def as_javascript(parameters):
    """Return parameters as NNI's manager writes them: without a point, where a number allows."""
    return {key: int(value) if value == int(value) else value for key, value in parameters.items()}


def builtin(name, kind="tuners", **arguments):
    return fixes.create_with_memory(name, arguments, kind)


class Own(Tuner):
    """A tuner of the user's own, which notes what it hears."""

    def __init__(self):
        self.heard, self.threads = [], set()

    def update_search_space(self, space):
        self.note("space", space)

    def generate_parameters(self, parameter_id, **_):
        return {"x": parameter_id}

    def receive_trial_result(self, parameter_id, parameters, value, **_):
        self.note("result", parameter_id, value)

    def trial_end(self, parameter_id, success, **_):
        self.note("end", parameter_id, success)

    def import_data(self, data):
        self.note("import", data)

    def note(self, *what):
        self.heard.append(what)
        self.threads.add(threading.current_thread())


DISCRETE = {
    "GridSearch": lambda: builtin("GridSearch"),
    "Random": lambda: builtin("Random", seed=0),
    "TPE": lambda: builtin("TPE", seed=0),
    "BruteForce": lambda: OptunaTuner("BruteForceSampler", seed=0),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", DISCRETE)
def test_a_resumed_search_gives_out_each_set_once(name):
    """Two of four trials have a result, one of them 0; one has failed and one is run again."""
    search = Search(DISCRETE[name]())
    given = search.ask(4)
    for _ in range(2):  # the second time before anything has run
        search = search.resumed(DISCRETE[name](), [0, 1])
    while parameters := search.ask():
        given += parameters
        search.report(search.given[-1], 1)
        search.end(search.given[-1])
    assert sorted(map(str, given)) == sorted(map(str, SETS))
    assert search.other[-1][0] is CommandType.NoMoreTrialJobs


@pytest.mark.parametrize(
    ("kind", "given", "values"),
    [
        ("quniform", [0.1, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ("choice", [[1, 2], {"a": 1}, None, "text"], [[1, 2], {"a": 1}, None, "text"]),
    ],
)
def test_a_grid_has_each_value_once(kind, given, values):
    search = Search(builtin("GridSearch"), {"x": {"_type": kind, "_value": given}})
    found = [parameters["x"] for parameters in search.ask(9)]
    found = [round(x, 3) if isinstance(x, float) else x for x in found]
    assert sorted(found, key=repr) == sorted(values, key=repr)
    assert search.other[-1][0] is CommandType.NoMoreTrialJobs


def test_a_resumed_batch_tuner_continues():
    batch = BATCH["combine_params"]["_value"]
    first = Search(builtin("Batch"), BATCH)
    assert first.ask(2) == batch[:2]
    second = first.resumed(builtin("Batch"), [0], BATCH)
    assert second.ask(9) == batch[2:]  # the first of it has a second turn


class Repeating(Own):
    """A tuner with a checkpoint of its own, which proposes each set three times on purpose."""

    def load_checkpoint(self):
        self.place = 4

    def generate_parameters(self, parameter_id, **_):
        self.place = getattr(self, "place", -1) + 1
        return {"x": self.place // 3}


def test_a_tuner_with_a_checkpoint_of_its_own_is_resumed_without_gaps():
    first = Search(Repeating())
    before = first.ask(5)
    second = first.resumed(Repeating(), [0])
    second.dispatcher.load_checkpoint()
    assert [set["x"] for set in before + second.ask(4)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["Random", "TPE"])
def test_a_seeded_search_continues_after_a_resume(name):
    whole = Search(builtin(name, seed=1), SEQUENCE).ask(6)
    first = Search(builtin(name, seed=1), SEQUENCE)
    before = first.ask(3)
    second = first.resumed(builtin(name, seed=1), [1.0], SEQUENCE)
    assert before + second.ask(3) == whole
    ids = [job["parameter_id"] for job in second.given]
    assert len(set(ids)) == 6


def test_a_trial_that_is_run_again_tells_the_tuner_its_result_and_the_assessor_its_reports():
    class Judge:
        assess_trial = lambda self, id, history: judged.append((id, history)) or True  # noqa: E731
        trial_end = lambda self, id, success: judged.append((id, success))  # noqa: E731

    judged = []
    search = Search(Own(), assessor=Judge())
    job = {"parameter_id": 3, "parameters": {"x": 0}}
    search.tell(CommandType.AddCustomizedTrialJob, [job])
    search.tell(CommandType.ReportMetricData, search.metric(job, 0.25, "PERIODICAL"))
    search.report(job, 0.5)
    search.end(job)
    assert search.dispatcher.tuner.heard[1:] == [
        ("import", [{"parameter": {"x": 0}, "value": 0.5}])
    ]
    assert judged == [("trial 3", [0.25])]
    search.dispatcher.tell_assessor_of_end(search.trial_end(job, "SUCCEEDED"))
    assert judged[1:] == [("trial 3", True)]


def test_the_tuner_hears_of_a_trial_in_its_own_thread_and_in_order():
    search = Search(Own())
    jobs = search.ask(3) and search.given
    dispatcher = search.dispatcher
    for job in jobs:  # its result is queued behind others, its end is not
        dispatcher.enqueue_command(CommandType.ReportMetricData, search.metric(job, 1.0))
        dispatcher.enqueue_command(CommandType.TrialEnd, search.trial_end(job, "EARLY_STOPPED"))
        late = search.metric(job, 2.0)
        dispatcher.enqueue_command(CommandType.ReportMetricData, late)
    workers = [dispatcher.assessor_worker, dispatcher.default_worker]
    dispatcher.tuner.threads.clear()
    for worker in workers:  # the assessor's, of whose ends NNI's tuner heard, goes first
        worker.start()
    while not dispatcher.default_command_queue.empty():
        pass
    dispatcher.stopping = True
    for worker in workers:
        worker.join()
    assert not dispatcher.worker_exceptions
    once = [[("result", n, 1.0), ("end", n, False)] for n in range(3)]
    assert dispatcher.tuner.heard[1:] == [*once[0], *once[1], *once[2]]
    assert dispatcher.tuner.threads == {dispatcher.default_worker}


NNIS = ["TPE", "Random", "GridSearch", "Evolution"]
HOW_TRIALS_END = [
    ("SUCCEEDED", [0.5]),
    ("FAILED", [0.5]),
    ("EARLY_STOPPED", [0.5]),
    ("SUCCEEDED", [0.5, 0.75]),
    ("SUCCEEDED", []),
    ("FAILED", []),
    ("SUCCEEDED", ["good"]),
    ("SUCCEEDED", [None]),
    ("SUCCEEDED", [[1]]),
    ("SUCCEEDED", [{"loss": 1}]),
    ("SUCCEEDED", [float("nan")]),
    ("SUCCEEDED", [{"default": 0}]),
]


@pytest.mark.parametrize("name", NNIS)
def test_nnis_tuners_survive_each_end_of_a_trial_and_a_trial_of_the_users(name):
    space = {"x": SPACE["x"], "y": {"_type": "uniform", "_value": [0, 1]}}
    search = Search(builtin(name), space)
    for event, values in HOW_TRIALS_END:
        search.ask()
        job = search.given[-1]
        for value in values:
            search.report(job, value)
        search.end(job, event)
    own = {"parameter_id": None, "parameters": {"z": 1}}
    search.report(own, 0.5)
    search.end(own)
    foreign = [{"parameter": {"z": 1}, "value": 1}, {"parameter": {"x": 0, "y": 0.5}}, 3]
    fitting = {"parameter": {"x": 0, "y": 0.5}, "value": "0"}
    search.tell(CommandType.ImportData, [*foreign, fitting])
    assert len(search.ask(2)) == 2


@pytest.mark.filterwarnings("ignore:json-tricks")
@pytest.mark.parametrize("number", [np.float32(0.125), np.array(0.125)])
def test_a_numpy_number_is_a_result(number):
    search = Search(builtin("TPE", optimize_mode="maximize"))
    search.ask()
    metric = search.metric(search.given[0], 0) | {"value": fixes.dump(number)}
    search.tell(CommandType.ReportMetricData, metric)
    ((record,), _) = search.dispatcher.tuner._history.values()
    assert record.loss == -0.125


CODE = [{key: "path:os._exit", "__args__": [1]} for key in sorted(fixes.CODE)]
NO_DATA = ["[" * 100_000 + "]" * 100_000, "no JSON", '{"__ndarray__": 1}', *map(json.dumps, CODE)]


@pytest.mark.parametrize("kind", ["PERIODICAL", "FINAL"])
@pytest.mark.parametrize("text", NO_DATA, ids=lambda text: text[:30])
def test_what_is_no_report_is_left_out_in_one_line(notices, text, kind):
    search = Search(Own())
    search.ask()
    metric = search.metric(search.given[0], 0, kind) | {"value": text}
    search.tell(CommandType.ReportMetricData, metric)
    (line,) = notices.read_text().splitlines()
    assert line.startswith("trial trial 0: a report is left out: ")
    assert len(line) < 250
    search.report(search.given[0], 1)  # a later one counts
    assert search.dispatcher.tuner.heard[1:] == [("result", 0, 1)]


@pytest.mark.parametrize(
    "spec",
    [
        {"_type": "choise", "_value": [1, 2]},
        {"_type": "choice", "_value": []},
        {"_type": "choice"},
        {"_type": "uniform", "_value": [1, 0]},
        {"_type": "uniform", "_value": [0, float("nan")]},
        {"_type": "loguniform", "_value": [0, 1]},
        {"_type": "quniform", "_value": [0, 1, 0]},
        3,
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_and_the_old_one_stays(notices, spec):
    search = Search(builtin("TPE"))
    search.tell(CommandType.UpdateSearchSpace, SPACE | {"x": spec})
    (line,) = notices.read_text().splitlines()
    assert line.startswith("the new search space is refused, and the old one stays: ")
    assert search.other[-1] == (fixes.SPACE_REFUSED, fixes.dump(SPACE))
    assert set(map(str, search.ask(6))) <= set(map(str, SETS))


@pytest.mark.parametrize("name", ["TPE", "Random", "GridSearch"])  # not Evolution
def test_a_new_space_may_hold_what_nnis_tuners_can_search(notices, name):
    space = {"x": {"_type": "choice", "_value": [None, [1], {"a": 1}, "text"]}}
    space |= {} if name == "GridSearch" else {"y": NORMAL}
    search = Search(builtin(name))
    search.tell(CommandType.UpdateSearchSpace, space)
    assert not notices.exists()
    assert search.ask()[0].keys() == space.keys()


@pytest.mark.parametrize("name", NNIS)
def test_a_space_that_changes_keeps_the_results_that_fit(name):
    search = Search(builtin(name), SPACE)
    search.ask(6)
    *ended, running = search.given
    for job in ended:
        search.report(job, job["parameters"]["x"])
        search.end(job)
    new = {"x": {"_type": "choice", "_value": [2, 1, 7]}, "y": SPACE["y"]}
    search.tell(CommandType.UpdateSearchSpace, new)
    search.report(running, 0.5)
    search.end(running)
    known = [job["parameters"]["x"] for job in search.given if job["parameters"]["x"] in (1, 2)]
    assert len(search.dispatcher.results) == len(known)
    given = [parameters["x"] for parameters in search.ask(2)]
    assert set(given) <= {2, 1, 7}
