"""rehearsal.py tries the tuner and the trial as NNI would start them, and ends them."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT
from projects import CONFIG, TRIAL
from stand_ins import stand_in_nvidia_smi
from test_checks import LOCAL
from waiting import wait_for

from nnisearch.before import config, rehearsal
from nnisearch.start.launch import UNDO, Watchdog

NEVER = "python3 -c 'import time; time.sleep(600)'"
TUNER = """
from nni.tuner import Tuner

class Mine(Tuner):
    def __init__({init}):
        pass
    def update_search_space(self, search_space):
        {update}
    def generate_parameters(self, parameter_id, **kwargs):
        {generate}
    def receive_trial_result(self, *args, **kwargs):
        raise RuntimeError("a result of 0.5 that no trial has reported")
"""


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Rehearse CONFIG with changes; return the folder that NNI would call the experiment's."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.py").write_text(TRIAL)

    def rehearse(**changes):
        (tmp_path / "config.yml").write_text(yaml.safe_dump(CONFIG | changes))
        folder = tmp_path / "experiment" / str(time.monotonic_ns())
        with Watchdog(folder, "create") as watchdog:
            rehearsal.rehearse(config.load(tmp_path / "config.yml"), folder, watchdog)
        return folder

    return rehearse


@pytest.fixture
def rehearse_trial(rehearse, monkeypatch):
    """Rehearse as above, but with given parameters and without the tuner, which takes longer."""
    given = [json.dumps({"parameter_id": id, "parameters": {"x": id}}) for id in range(2)]
    monkeypatch.setattr(rehearsal, "rehearse_tuner", lambda *_: given)
    return rehearse


# The command without its checks of the machine, and with given parameters.
WITHOUT_TUNER = [
    "-c",
    "import sys; from nnisearch import cli; from nnisearch.before import checks, rehearsal;"
    "checks.check = lambda _: []; rehearsal.rehearse_tuner = lambda *_: ['{}'];"
    "sys.exit(cli.main())",
]


def write_tuner(tmp_path, init="self", update="pass", generate="return {'x': 7}"):
    text = TUNER.format(init=init, update=update, generate=generate)
    (tmp_path / "mine.py").write_text(text)
    return {"className": "mine.Mine", "codeDirectory": "."}


def test_a_trial_gets_the_tuners_own_parameters_and_what_nni_sets(rehearse, tmp_path):
    keys = "NNI_PLATFORM NNI_EXP_ID NNI_SYS_DIR NNI_OUTPUT_DIR NNI_TRIAL_JOB_ID NNI_CODE_DIR"
    command = (
        f"pwd > where; printenv {keys} NNI_TRIAL_SEQ_ID >> where; cat $NNI_SYS_DIR/*.cfg >> where"
    )
    folder = rehearse(trialCommand=command, tuner=write_tuner(tmp_path))
    where, platform, experiment, folder_1, folder_2, _, code, number, given = (
        (tmp_path / "where").read_text().splitlines()
    )
    assert (where, platform, experiment) == (str(tmp_path), "local", "rehearsal")
    assert (number, code) == ("0", str(tmp_path))
    assert folder_1 == folder_2 == str(folder / "trial0")
    assert '"parameters": {"x": 7}' in given


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"update": "search_space['y']"}, "tuner is mine.Mine: KeyError: 'y'"),
        ({"generate": "assert parameter_id > 7"}, "AssertionError: assert parameter_id > 7"),
        ({"generate": "raise RuntimeError('no luck')"}, "RuntimeError: no luck"),
        ({"generate": "import os; os._exit(3)"}, "tuner is mine.Mine: "),
    ],
)
def test_a_tuners_exception_is_the_refusal(rehearse, tmp_path, change, part):
    with pytest.raises(ValueError) as error:
        rehearse(tuner=write_tuner(tmp_path, **change))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


GP = {"cold_start_num": 2, "selection_num_warm_up": 9, "selection_num_starting_points": 1}
NESTED = {"_type": "choice", "_value": [{"_name": "a", "k": CONFIG["searchSpace"]["x"]}]}


@pytest.mark.parametrize(
    ("tuner", "said"),
    [
        ({"name": "Evolution", "classArgs": {"population_size": 4}}, "trial (4) end"),
        ({"name": "GP", "classArgs": GP}, "Received trial result."),
    ],
)
def test_nnis_tuners_are_tried_with_results(rehearse, monkeypatch, tuner, said):
    monkeypatch.setattr(rehearsal, "RESULTS_PATIENCE", 60)
    monkeypatch.setattr(rehearsal, "RESULTS", 5)
    space = CONFIG["searchSpace"] | {"y": {"_type": "randint", "_value": [0, 9]}}
    folder = rehearse(searchSpace=space, trialCommand="true", maxTrialNumber=99, tuner=tuner)
    log = (folder / "tuner" / "dispatcher.log").read_text()
    assert said in log
    assert "ERROR" not in log


def test_a_tuners_exception_after_results_is_the_refusal(rehearse):
    tuner = {"name": "PBT", "classArgs": {"optimize_mode": "maximize", "population_size": 3}}
    with pytest.raises(ValueError, match="is not in list; allowed for PBT: options that have no"):
        rehearse(tuner=tuner, searchSpace={"x": NESTED}, maxTrialNumber=99)
    rehearse(tuner=tuner, searchSpace={"x": NESTED}, maxTrialNumber=3)  # ends before that


def test_the_tuner_sees_numbers_as_nnis_manager_writes_them():
    space = {"x": {"_type": "quniform", "_value": [0.0, 1.5, 1e3, 1e-9, 10**400, "1.0"]}}
    values = rehearsal.as_javascript(space)["x"]["_value"]
    assert list(map(repr, values)) == ["0", "1.5", "1000", "1e-09", repr(10**400), "'1.0'"]


@pytest.mark.parametrize(
    ("base", "call", "expected"),
    [("TpeTuner", "'maximize'", "maximize"), ("TpeTuner", "", "minimize"), ("Tuner", "", "")],
)
def test_the_direction_is_noted_from_the_tuner(rehearse, tmp_path, base, call, expected):
    (tmp_path / "mine.py").write_text(
        "from nni.tuner import Tuner\nfrom nni.algorithms.hpo.tpe_tuner import TpeTuner\n"
        f"class Mine({base}):\n    def __init__(self): super().__init__({call})\n"
        "    def update_search_space(self, space): pass\n"
        "    def generate_parameters(self, id, **others): return {'x': 1}\n"
    )
    folder = rehearse(tuner={"className": "mine.Mine", "codeDirectory": "."})
    assert (folder / "tuner" / "direction").read_text() == expected


def test_a_tuner_gets_the_environment_of_nnis_manager(rehearse, tmp_path):
    (tmp_path / "nni.txt").touch()
    sees = (
        "import __main__, multiprocessing, os, sys; from pathlib import Path; "
        f"assert sys.path[-1] == '{tmp_path}', sys.path; assert os.getcwd() == sys.path[0] == "
        "os.environ['NNI_LOG_DIRECTORY']; assert Path(os.environ['NNI_CHECKPOINT_DIRECTORY'])"
        ".is_dir(); assert os.environ['CUDA_VISIBLE_DEVICES'] == ''; "
        "assert __main__.__spec__.name == 'nni.__main__'; assert __main__.__file__ == sys.argv[0]; "
        "assert not {'fixes', 'dispatcher', 'nnisearch', 'pandas'} & set(sys.modules); "
        "assert multiprocessing.get_context('spawn').Pool(1).apply(len, [[1]]) == 1"
    )
    rehearse(tuner=write_tuner(tmp_path, update=sees))


def test_no_password_is_in_the_tuners_command_line(rehearse, tmp_path):
    reads = "told = open('/proc/self/cmdline').read(), sys.argv[2]"
    tells = f"import sys; {reads}; open('{tmp_path}/told', 'w').write('|'.join(told))"
    tuner = write_tuner(tmp_path, init="self, word", update=tells)
    rehearse(tuner=tuner | {"classArgs": {"word": "secret" * 50_000}})
    shown, given = (tmp_path / "told").read_text().split("|")
    assert len(shown) < 1000
    assert json.loads(base64.b64decode(given))["tuner"]["classArgs"] == {"word": "secret" * 50_000}


@pytest.mark.parametrize(
    "command",
    [
        "python3 trial.py; exit 0",
        f"cat $NNI_SYS_DIR/parameter.cfg > given; {NEVER}",  # goes on with its parameters
        f"python3 trial.py; {NEVER}",  # goes on after a report
        "true",
    ],
)
def test_working_trials_are_accepted(rehearse_trial, command):
    rehearse_trial(trialCommand=command)


def test_no_argument_shows_the_trial_command(rehearse_trial, tmp_path):
    shows = "ps axww -o args | grep [x]yz98765 > shown"
    rehearse_trial(trialCommand=f"export API_KEY=xyz98765; {shows}; cat $NNI_SYS_DIR/parameter.cfg")
    assert (tmp_path / "shown").read_text() == ""


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("python3 trian.py", "trian.py"),
        ("cat $NNI_SYS_DIR/parameter.cfg; sleep 1; exit 3", "it fails with status 3"),
        ("kill -9 $$", "it was ended by signal 9: it has printed nothing"),
        ("python3 -c 'raise KeyError(1)' 2>&1", "it fails with status 1: KeyError: 1"),
    ],
)
def test_failing_trials_are_refused_with_the_reason(rehearse_trial, command, part):
    with pytest.raises(ValueError) as error:
        rehearse_trial(trialCommand=command)
    assert str(error.value).startswith("trialCommand is ")
    assert part in str(error.value)


def test_a_failure_with_some_parameters_is_no_refusal(rehearse, tmp_path):
    third = "cat $NNI_SYS_DIR/parameter.cfg; test $NNI_TRIAL_SEQ_ID = 2"
    rehearse(trialCommand=third, maxTrialNumber=9)
    with pytest.raises(ValueError, match=r"tried with each of 5 sets of parameters, such as {"):
        rehearse(trialCommand="cat $NNI_SYS_DIR/parameter.cfg; exit 1", maxTrialNumber=9)


def test_a_line_tells_what_the_command_waits_for(rehearse_trial, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "NOTICE", 0.5)
    monkeypatch.setattr(rehearsal, "TRIAL_PATIENCE", 2)
    rehearse_trial(trialCommand=f"echo downloading; {NEVER}")
    printed = capsys.readouterr().out
    assert "Waiting for the trial to read its parameters (--no-rehearsal skips this)" in printed
    assert "its last line: downloading" in printed


@pytest.mark.parametrize("end", ["sleep 987", "exit 0"])
@pytest.mark.parametrize(
    "start",
    ["sleep 987 & echo $! > pid", "setsid -f bash -c 'echo $$ > pid; exec sleep 987'; sleep 0.5"],
)
def test_nothing_is_left_of_the_trial_that_was_tried(rehearse_trial, tmp_path, start, end):
    rehearse_trial(trialCommand=f"{start}; cat $NNI_SYS_DIR/parameter.cfg; {end}")
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int((tmp_path / "pid").read_text()))
        assert process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_read_only_folders_are_removed_and_what_they_link_to_stays(tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o500)
    inner = tmp_path / "folder" / "read-only" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    (inner / "link").symlink_to(other)
    for path, mode in (
        (inner, 0),
        (inner.parent, 0o500),
        (inner.parents[1], 0o700),
        (other, 0o500),
    ):
        os.chown(path, 65534, 65534)
        path.chmod(mode)
    tmp_path.chmod(0o777)
    code = "from pathlib import Path; from nnisearch.shared.output import remove; import os;"
    code += f"os.chdir({str(tmp_path)!r}); os.setuid(65534); remove(Path('folder'))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert other.stat().st_mode & 0o777 == 0o500


def test_a_trial_is_tried_on_a_free_gpu_only(rehearse_trial, tmp_path, monkeypatch):
    stand_in_nvidia_smi(tmp_path, busy=[True, False])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = {"trialGpuNumber": 1, "trainingService": LOCAL}
    gpu |= {"trialCommand": "printenv CUDA_VISIBLE_DEVICES > seen"}
    rehearse_trial(**gpu)
    assert (tmp_path / "seen").read_text() == "1\n"
    (tmp_path / "seen").unlink()
    stand_in_nvidia_smi(tmp_path, busy=[True, True])
    rehearse_trial(**gpu)
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name
)
def test_a_start_that_ends_while_the_trial_is_tried_leaves_nothing(start_search, home, number):
    trial = "echo $$ > pid; sleep 987 & echo $! >> pid; wait"
    with start_search(config=CONFIG | {"trialCommand": trial}, how=WITHOUT_TUNER) as process:
        pids = home / "pid"
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        tried = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        process.send_signal(number)
        if number == signal.SIGINT:  # once more, while it tidies up
            time.sleep(0.05)
            process.send_signal(number)
        printed = "".join(process.communicate(timeout=120))
    assert psutil.wait_procs(tried, timeout=120)[1] == []
    kept = {".experiment", ".experiment.lock", ".nnisearch.lock"}
    wait_for(lambda: {path.name for path in home.glob("nni-experiments/*")} <= kept)
    assert "Traceback" not in printed


def test_what_is_interrupted_at_its_start_is_ended(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, command, **how):
            super().__init__(command, **how)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    # A script in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Watchdog(tmp_path / "folder", "create") as watchdog:
        monkeypatch.setattr(subprocess, "Popen", Interrupted)
        with watchdog.running(["sleep", "987"]):
            pass
    signal.signal(signal.SIGINT, before)
    assert started[0].wait(60) == -signal.SIGTERM


def test_what_a_killed_launcher_has_run_is_ended(tmp_path):
    with subprocess.Popen(["sleep", "987"], start_new_session=True) as sleeper:
        command = [sys.executable, UNDO, tmp_path / "folder", "create"]
        subprocess.run(command, input=f"wait\nrun {sleeper.pid}\n", text=True, check=True)
    assert sleeper.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_the_reason_of_a_failure_is_found_in_the_output(text, expected):
    assert rehearsal.reason(text) == expected
