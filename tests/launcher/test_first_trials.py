"""A search whose tuner or first trials cannot work is refused by its start, and leaves nothing."""

import contextlib
import os
import signal
import subprocess
import types

import pytest
import yaml
from experiment import assert_nothing_is_left
from projects import CONFIG, TRIAL
from waiting import wait_for

from nnisearch.before import config
from nnisearch.results.trials import Trial
from nnisearch.shared import text
from nnisearch.watch import first_trials

NNISEARCH = ["-m", "nnisearch.cli"]
TUNER = """
from nni.tuner import Tuner

class Mine(Tuner):
    def __init__(self):
        {init}
    def update_search_space(self, search_space):
        {update}
    def generate_parameters(self, parameter_id, **kwargs):
        {generate}
    def receive_trial_result(self, *args, **kwargs):
        pass
"""


def write_tuner(home, name, **methods):
    """Write a tuner's module, and return its key of a configuration."""
    bodies = {"init": "pass", "update": "pass", "generate": "return {'x': 7}"} | methods
    (home / f"{name}.py").write_text(TUNER.format(**bodies))
    return {"tuner": {"className": f"{name}.Mine", "codeDirectory": str(home)}}


@pytest.fixture
def start_together(start_search, home):
    """Start several searches at once, each by CONFIG with changes; yield their processes."""
    (home / "trial.py").write_text(TRIAL)

    @contextlib.contextmanager
    def start_together(*changes):
        with contextlib.ExitStack() as stack:
            processes = []
            for number, change in enumerate(changes):
                path = home / f"config{number}.yml"
                path.write_text(yaml.safe_dump(CONFIG | change))
                processes.append(stack.enter_context(start_search(path, how=NNISEARCH)))
            yield processes

    return start_together


def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(start_together, home):
    tpe = {"name": "TPE", "classArgs": {"optimise_mode": "minimize"}}
    refused = [
        (write_tuner(home, "a", init="import not_there"), "a.Mine: ModuleNotFoundError: No module"),
        (write_tuner(home, "b", update="search_space['y']"), "tuner is b.Mine: KeyError: 'y'"),
        (write_tuner(home, "c", generate="raise RuntimeError('no luck')"), "RuntimeError: no luck"),
        (write_tuner(home, "d", generate="import os; os._exit(3)"), "without an error message"),
        ({"tuner": tpe}, "'optimise_mode'; allowed in classArgs: optimize_mode, seed, tpe_args"),
        ({"trialCommand": "python3 trian.py"}, "python3: can't open file"),
        ({"trialCommand": "cat $NNI_SYS_DIR/parameter.cfg; exit 3"}, "the first 2 trials fail, su"),
    ]
    with start_together(*[change for change, _ in refused]) as processes:
        results = [process.communicate(timeout=240) for process in processes]
    for (_, part), (stdout, stderr) in zip(refused, results, strict=True):
        assert stderr.count("\n") == 1, stdout + stderr
        assert stderr.startswith("nnisearch: error: ")
        assert part in stderr
        assert "Web UI" not in stdout
    assert_nothing_is_left(home)


# All that the trial does in one of these ways was refused when trials were tried before a search.
ODD_TRIAL = """
import atexit, json, os, socket, time
from pathlib import Path

lock = Path("lock")
lock.open("x").close()
atexit.register(lock.unlink)
id, trial = os.environ["NNI_EXP_ID"], os.environ["NNI_TRIAL_JOB_ID"]
experiment = Path(os.environ["NNI_SYS_DIR"]).parents[1]
from other_project import report
Path(f"{id}-{trial}").mkdir()
(experiment / "note").touch()
assert id in json.loads(Path("~/nni-experiments/.experiment").expanduser().read_text())
with socket.create_connection(("127.0.0.1", int(Path("port").read_text()))) as tuner:
    assert tuner.recv(9) == b"hello"
files = Path("prepared")
if not files.exists():
    files.mkdir()
    for number in range(100):
        (files / str(number)).touch()
        time.sleep(0.03)
report("FINAL", len(list(files.iterdir())))
"""
SERVER = """
        import os, socketserver, sys, threading
        from pathlib import Path
        class Hello(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.send(b"hello")
        server = socketserver.TCPServer(("127.0.0.1", 0), Hello)
        Path("{home}", "port").write_text(str(server.server_address[1]))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = Path("/proc/self/cmdline").read_text()
        assert len(told) < 1000 and "secret" not in told
        assert os.getcwd() == sys.path[0] == os.environ["NNI_LOG_DIRECTORY"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not {{"fixes", "dispatcher", "nnisearch", "pandas"}} & set(sys.modules)
        self.optimize_mode = "minimize"
"""


def test_trials_that_may_not_run_twice_run_and_their_tuner_sees_what_nni_sets(run_search, home):
    (home / "trial.py").write_text(ODD_TRIAL)
    tuner = write_tuner(home, "mine", init=SERVER.format(home=home).strip())
    changes = {"trialConcurrency": 1, "maxTrialNumber": 3, "experimentName": "secret"}
    (home / "config.yml").write_text(yaml.safe_dump(CONFIG | tuner | changes))
    result = run_search("config.yml", how=NNISEARCH)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("; best 100") == 3
    assert not (home / "lock").exists()
    (log,) = home.glob("nni-experiments/_latest/log")
    assert (log / "direction").read_text() == "minimize"
    assert (log.parent / "note").exists()
    assert len(list(home.glob(f"{log.parent.resolve().name}-*"))) == 3


def test_keep_going_starts_a_search_whose_trials_fail(run_search, home):
    (home / "config.yml").write_text(yaml.safe_dump(CONFIG | {"trialCommand": "exit 3"}))
    result = run_search("create", "--config", "config.yml", "--keep-going", how=NNISEARCH)
    assert result.returncode == 1
    assert "None of 2 trials has a result" in result.stdout


def test_a_start_that_ends_in_its_first_moments_leaves_nothing(start_together, home):
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    commands = [
        f"echo $$ > {home}/pid{n}; sleep 987 & echo $! >> {home}/pid{n}; wait" for n in numbers
    ]
    with start_together(*[{"trialCommand": each} for each in commands]) as processes:
        running = dict(zip(numbers, processes, strict=True))

        def send_signals():
            for number in [*running]:
                pids = home / f"pid{number}"
                if pids.exists() and len(pids.read_text().split()) == 2:
                    running.pop(number).send_signal(number)
            return not running

        wait_for(send_signals)
        processes[-1].send_signal(signal.SIGINT)  # once more, while it tidies up
        printed = [process.communicate(timeout=240) for process in processes]
    assert printed[-1][1] == "nnisearch: interrupted; no search has started\n"
    assert "Traceback" not in str(printed)
    assert_nothing_is_left(home)


# The first trials, without a search


@pytest.fixture
def first(tmp_path, monkeypatch):
    """Make the first trials of a search from (status, report), at a time in seconds."""
    (tmp_path / "config.yml").write_text(yaml.safe_dump(CONFIG | {"maxTrialNumber": 9}))
    loaded, _ = config.load(tmp_path / "config.yml")
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(first_trials, "time", clock)
    monkeypatch.setattr(first_trials, "has_process", lambda id: id != "gone")

    def first(*trials, readers=None, seconds=0.0, tuner="Random"):
        loaded.tuner.name, loaded.tuner.class_name = tuner, None if tuner else "mine.Mine"
        clock.now = 0.0
        made = first_trials.FirstTrials(loaded, tmp_path, readers)
        by_id = {}
        for number, (status, report) in enumerate(trials):
            by_id[str(number)] = trial = Trial(number, str(number), status)
            trial.result = report if isinstance(report, float) else None
            trial.reported = report if isinstance(report, str) else None
        changed = list(by_id.values())
        made.trials = types.SimpleNamespace(by_id=by_id, update=lambda: changed)
        made.update()
        changed.clear()
        clock.now = seconds
        made.update()
        return made

    return first


FAILED, RUNNING, DONE, WAITING = "FAILED", "RUNNING", "SUCCEEDED", "WAITING"


@pytest.mark.parametrize(
    ("trials", "how", "part"),
    [
        ([(FAILED, None)], {"readers": {}}, "fails before it reads its parameters"),
        ([(RUNNING, None), (FAILED, None)], {"readers": {"0": 0}}, "fails before it reads"),
        ([(DONE, None)], {"readers": {}}, "without reading its parameters, and without a report"),
        ([(FAILED, None)] * 5, {"readers": dict.fromkeys("01234", 0)}, "the first 5 trials fail"),
        ([(FAILED, None)] * 5, {}, "the first 5 trials fail"),  # without inotify
        ([(RUNNING, "a Python object, such as a tensor")], {}, "reports a Python object, such as"),
        ([(DONE, '{"acc": 0.5}')], {}, 'reports {"acc": 0.5}, which is no result; allowed: a fin'),
    ],
)
def test_trials_that_show_that_none_can_work_are_refused(first, trials, how, part):
    with pytest.raises(ValueError, match=r"trialCommand is 'python3 trial\.py': ") as error:
        first(*trials, **how).are_good("RUNNING")
    assert part in str(error.value)
    assert "; --keep-going starts the search all the same" in str(error.value)


@pytest.mark.parametrize(
    ("trials", "how", "expected"),
    [
        ([(RUNNING, None)], {"readers": {}, "seconds": 99}, False),
        ([(RUNNING, None)], {"readers": {"0": 0}, "seconds": 1}, False),
        ([(RUNNING, None)], {"readers": {"0": 0}, "seconds": 4}, True),
        ([(RUNNING, None)], {"seconds": 3}, False),  # without inotify
        ([(RUNNING, None)], {"seconds": 11}, True),
        ([(RUNNING, 0.5)], {"readers": {}}, True),
        ([(FAILED, 0.5)], {"readers": {}}, True),
        ([(FAILED, None)] * 4, {}, False),
        ([(FAILED, None), (DONE, None)], {"readers": {"0": 0, "1": 0}}, True),
        ([(DONE, "NaN")], {}, True),  # a training that diverges with these parameters
        ([(DONE, '{"acc": 0.5}')], {"tuner": None}, True),  # a user's own tuner may read it
        ([("USER_CANCELED", None)], {"readers": {}}, True),
        ([], {"seconds": 99}, False),
    ],
)
def test_the_watch_ends_when_a_trial_shows_that_trials_work(first, trials, how, expected):
    assert first(*trials, **how).are_good("RUNNING") is expected


def test_a_trial_whose_process_has_ended_is_not_good_yet(first):
    late = first((RUNNING, None), readers={"0": 0, "gone": 0}, seconds=4)
    late.trials.by_id["0"].id = "gone"  # NNI has not noticed it
    assert not late.are_good("RUNNING")


def test_fewer_trials_than_five_may_be_all(first):
    two = first((FAILED, None), (FAILED, None), seconds=4)
    assert not two.are_good("RUNNING")
    with pytest.raises(ValueError, match="the first 2 trials fail, such as with "):
        two.are_good("TUNER_NO_MORE_TRIAL")


def test_trials_that_wait_end_the_watch_after_ten_seconds(first):
    assert not first((WAITING, None), (RUNNING, None), seconds=99).waits
    assert not first((WAITING, None), (WAITING, None), seconds=9).waits
    assert first((WAITING, None), (WAITING, None), seconds=11).waits


def test_a_line_tells_what_the_start_waits_for(first, tmp_path):
    assert first().awaited() == "the tuner's first parameters"
    assert first((WAITING, None)).awaited() == "a trial to start"
    (tmp_path / "trials" / "0").mkdir(parents=True)
    (tmp_path / "trials" / "0" / "stderr").write_text("loading\n")
    assert first((RUNNING, None), readers={}).awaited() == (
        "a trial to read its parameters, or to report; the last line of the first: loading"
    )


def test_a_trial_that_reads_its_parameters_is_noticed(tmp_path):
    with first_trials.noticing_readers(tmp_path / "trials") as readers:
        for name in "ab":
            (tmp_path / "trials" / name).mkdir()
            (tmp_path / "trials" / name / "parameter.cfg").write_text("{}")
        (tmp_path / "trials" / "b" / "stdout").touch()  # as NNI does when it starts a trial
        subprocess.run(["cat", tmp_path / "trials" / "b" / "parameter.cfg"], check=True)
        wait_for(lambda: readers)
        assert list(readers) == ["b"]


@pytest.mark.parametrize("call", ["inotify_init1", "inotify_add_watch"])
def test_at_inotifys_limit_no_trial_is_accused(tmp_path, monkeypatch, call):
    calls = {"inotify_init1": lambda _: os.open("/dev/null", os.O_RDONLY)}
    calls |= {"inotify_add_watch": lambda *_: 1, call: lambda *_: -1}
    libc = types.SimpleNamespace(**calls)
    monkeypatch.setattr(first_trials.ctypes, "CDLL", lambda _: libc)
    with first_trials.noticing_readers(tmp_path / "trials") as readers:
        assert readers is None


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("", "it has printed nothing"),
        ("one\ntwo\n", "two"),
        ("Traceback\n  File x\nValueError: no\n", "ValueError: no"),
        (
            "train.py: error: lr is 0\nE1 torch failed\nerrors.ChildFailedError:\n====\n",
            "train.py: error: lr is 0",
        ),
        (
            "Traceback (most recent call last):\n  File x\n    assert 1 == 2\nAssertionError\n",
            "AssertionError: assert 1 == 2",
        ),
        (
            "Traceback (most recent call last):\n  File x\nmy.Trouble: no \x1b[31mred\nat all\n",
            "my.Trouble: no red",
        ),
        (  # of rich, and of Python 3.13
            "╭─ \x1b[1;31mTraceback \x1b[0m─╮\n\x1b[1;91mValueError: \x1b[0mbad \x1b[1m3\x1b[0m\n",
            "ValueError: bad 3",
        ),
        ("\x1b[1;35mKeyError\x1b[0m: \x1b[35m'a'\x1b[0m\ncounting\n", "KeyError: 'a'"),
        (f"IndexError: {'x' * 60_000} is wrong", f"IndexError: {'x' * 321}...{'x' * 655} is wrong"),
    ],
)
def test_the_reason_of_a_failure_is_found_in_the_output(printed, expected):
    assert text.reason(printed) == expected
