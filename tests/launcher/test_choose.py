"""choose.py: the choice, its sources, its output and its errors."""

import contextlib
import json
import os
import re
import runpy
import signal
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, as_process
from nnis_files import database, trial

import train
from nnisearch.results import choose, files, importance
from nnisearch.results import trials as results
from nnisearch.shared import output, processes
from nnisearch.shared.direction import direction, explanation


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `python choose.py ...` in this process, with a HOME of its own and in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr("sys.argv", ["choose.py", *map(str, args)])
        return as_process(capsys, runpy.run_path, str(ROOT / "choose.py"), run_name="__main__")

    return run


def refusal(result):
    """Return the one line with which choose.py ended."""
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("trials", "rule", "expected"),
    [
        ([trial(0, 64.0), trial(1, 65.0), trial(2, 60.0, 1)], (0.5,), 1),
        ([trial(0, 64.6, 9), trial(1, 65.0, 30), trial(2, 64.4, 1)], (0,), 1),
        ([trial(0, 64.6, 9), trial(1, 65.0, 30), trial(2, 64.4, 1)], (1,), 2),
        ([trial(0, 65, 9, [2, 1]), trial(1, 65, 8.9, [1.5, 1]), trial(2, 65, 30, [0])], (0.5,), 1),
        ([trial(0, 65, 9.2, [2, 1]), trial(1, 65, 8.9, [2, 1.4])], (0.5,), 0),
        ([trial(0, 65, None), trial(1, 65, 100)], (0.5,), 1),
        ([trial(0, 64.9), trial(1, 65)], (0.5,), 1),
        ([trial(0, 62.54, 1), trial(1, 63.04)], (0.5,), 0),
        ([trial(0, 62.53, 1), trial(1, 63.04)], (0.5,), 1),
        ([trial(0, 0.13, 1), trial(1, 0.1, 9)], (0.05, "minimize"), 0),
        ([trial(0, 2e-12, 1), trial(1, 1e-12, 9)], (0, "minimize"), 1),
        # Accuracies, which rise: the greater area has learned faster.
        ([trial(0, 1, 9, [0.1, 0.9]), trial(1, 1, 9, [0.6, 0.9])], (0,), 1),
        ([trial(0, 1, 9, [2.0, 0.9]), trial(1, 1, 9, [1.0, 0.9])], (0,), 1),
        ([trial(0, 1, 9, [2.0]), trial(1, 1, 9, [1.0])], (0, "minimize"), 1),
    ],
)
def test_the_choice_is_good_then_short_then_quick_to_learn(trials, rule, expected):
    trials = [*map(files.imported, trials)]
    assert choose.choose(trials, *rule).number == expected


MIXED = [
    trial(0, 60.0, 30.0, [2.0, 1.5, 1.25]),
    trial(1, None, 5.0, [2.3], "FAILED"),
    trial(2, 64.25, 90.0, [1.9, 1.1], optimizer="Adam"),
    trial(3, None, 9.0, [2.2], "USER_CANCELED"),
    trial(4, 64.0, 40.0, [1.9, 1.2], "EARLY_STOPPED"),  # it counts, as in NNI's Web UI
    trial(5, None, 9.0, [1.0], "EARLY_STOPPED"),
    trial(6, None, 12.0, [1.8], "RUNNING"),
    trial(7, None, None, [], "WAITING"),
    trial(8, None, 12.0, [1.8]),
    trial(9, float("nan"), 12.0, [float("nan")]),
]


@pytest.fixture
def mixed(tmp_path):
    """The database of a search whose trials have ended in each way."""
    return database(tmp_path, MIXED)


def test_the_table_has_trials_with_a_result_and_the_rest_is_counted(run, mixed):
    result = run()
    assert result.returncode == 0, result.stderr
    title, head, *rows, counts, strange, left, rule, values = result.stdout.splitlines()
    assert title == "abc123: a search"
    assert " ".join(head.split()) == "trial result seconds last area lr optimizer"
    assert [row.split() for row in rows] == [
        ["2", "64.25", "90", "1.1", "1.5", "0.03", "Adam"],
        ["*", "4", "64", "40", "1.2", "1.55", "0.05", "-"],
        ["0", "60", "30", "1.25", "1.583", "0.01", "-"],
    ]
    assert counts == (
        "3 of 10 trials have a result; left out: 1 FAILED, 1 USER_CANCELED, 1 EARLY_STOPPED"
        " (by maxTrialDuration or an assessor), 1 RUNNING, 1 WAITING, 2 without a result"
    )
    assert strange == f"trial 9 (id9) reported NaN, {results.NO_RESULT}"
    assert left.startswith("RUNNING and WAITING: no manager continues this search on this mach")
    assert rule.startswith("* the choice, trial 4 (id4): the shortest one within 0.5 of the great")
    assert json.loads(values) == {"lr": 0.05}


@pytest.mark.parametrize(("action", "is_told"), [("resume", False), ("view", True)])
def test_a_viewed_search_does_not_go_on(run, mixed, monkeypatch, action, is_told):
    arguments = ["node", "nni_node/main.js", "--experiment-id", "abc123", "--action", action]
    manager = SimpleNamespace(cmdline=lambda: arguments)
    monkeypatch.setattr(processes, "own_processes", lambda: [manager])
    assert ("this is the state it was left in" in run().stdout) == is_told


def test_the_latest_experiment_is_the_default(run, tmp_path):
    for name, start in (("older", 1), ("latest", 3), ("old", 2)):
        database(tmp_path, [trial(0, 60.0)], name, start=start)
    assert run().stdout.startswith("latest: ")
    assert run("old").stdout.startswith("old: ")


def test_the_same_results_as_json_and_in_fewer_lines(run, mixed, tmp_path):
    printed = run("--json").stdout
    assert json.loads(printed)["choice"] == "id4"
    (tmp_path / "results.json").write_text(printed)
    assert run("--file", "results.json").stdout == run().stdout
    assert run("--file", "results.json", "--json", "--top", 1).stdout == printed
    top = run("--top", 1).stdout
    assert len(top.splitlines()) == 8
    assert "trial 4 (id4)" in top


def test_what_is_the_same_in_all_trials_has_no_column(run, tmp_path):
    same = {"optimizer": "SGD", "epochs": 9, "layers": [64, 32]}
    entries = [trial(0, 1.0, **same), trial(1, 2.0, **same), trial(2, 3.0, **same, dropout=0.5)]
    database(tmp_path, entries)
    _, head, *_, line = run().stdout.splitlines()[:6]
    assert " ".join(head.split()) == "trial result seconds last area lr dropout"
    assert line == "The same in all trials: optimizer SGD, epochs 9, layers [64, 32]"


def test_train_py_accepts_the_file_of_out(run, mixed, tmp_path):
    assert run("--out=~/best.json").returncode == 0  # which the shell leaves as it is
    kept = json.loads((tmp_path / "best.json").read_text())
    choice = {"trial": 4, "id": "id4", "result": 64.0, "hyperparameters": {"lr": 0.05}}
    assert kept == {"experiment": "abc123"} | choice
    assert train.parse_args(["--params", str(tmp_path / "best.json")]).lr == 0.05


@pytest.fixture(scope="module")
def fonts():
    """matplotlib, imported before HOME changes: it would list all fonts anew in each HOME."""
    pytest.importorskip("matplotlib.figure", reason="matplotlib is optional")


def test_plot_writes_a_png_and_needs_matplotlib(fonts, run, mixed, tmp_path, monkeypatch):
    result = run("--plot", "search.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # then its import fails
    line = refusal(run("--plot", "another.png"))
    assert "--plot needs matplotlib (pip install matplotlib)" in line
    assert {path.name for path in tmp_path.iterdir()} == {"nni-experiments", "search.png"}


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["nobody"], ["EXPERIMENT_ID is 'nobody'", "allowed: abc123"]),
        (["--within", "-1"], ["--within is -1.0", ">= 0"]),
        (["--within", "nan"], ["--within is nan", ">= 0"]),
        (["--top", "0"], ["--top is 0", ">= 1"]),
        (["--out", ""], ["--out", "it is ''; allowed: the name of a file"]),
        (["--out", "no/such/best.json"], ["cannot write no/such/best.json: No such file"]),
        (["--out", "pipe"], ["cannot write pipe: it is no plain file; allowed: "]),
        (["--out", "/dev/stdout"], ["cannot write /dev/stdout: it is no plain file; allowed: "]),
        (["--maximize", "--minimize"], ["not allowed with"]),
        (["--file", "missing.json"], ["missing.json", "No such file"]),
        (["--file", "text.json"], ["text.json is not JSON"]),
        (["--file", "deep.json"], ["deep.json is not JSON"]),
        (["--file", "other.json"], ["other.json holds no results", "'experiment' is missing"]),
        (["--file", "list.json"], ["list.json holds no results"]),
        (["abc123", "--file", "list.json"], ["EXPERIMENT_ID is 'abc123'", "--file"]),
    ],
)
def test_wrong_arguments_and_files_are_refused(run, mixed, tmp_path, args, parts):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "list.json").write_text("[1, 2]")
    line = refusal(run(*args))
    assert all(part in line for part in parts), line


def test_no_experiment_and_one_without_a_result_are_errors(run, tmp_path, monkeypatch):
    assert f"no experiment: {tmp_path}/nni-experiments/.experiment lists none" in refusal(run())
    database(tmp_path, [trial(0, None, 5.0, [], "RUNNING")])
    assert "a search: none of 1 trials has a result" in refusal(run())
    database(tmp_path, [], "empty", start=5000)
    assert "a search: none of 0 trials has a result" in refusal(run())
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user without a name
    assert "HOME is not set; allowed: " in refusal(run())
    assert run("--file", ROOT / "docs" / "searches" / "wide.json").returncode == 0


@pytest.mark.parametrize("listed", ["", "{", "[1]", '{"abc": {"logDir": "/"}}'])
def test_a_damaged_list_of_experiments_is_an_error(run, mixed, tmp_path, listed):
    path = tmp_path / "nni-experiments" / ".experiment"
    path.write_text(listed)  # "": as a power cut leaves it
    for args in ([], ["abc"]):
        line = refusal(run(*args))
        assert f"{path} is damaged" in line
        assert f"mv '{path}' '{path}.damaged'; a search is still found by its ID" in line
    assert run("abc123").returncode == 0


def test_a_search_is_found_by_its_folder(run, mixed, tmp_path):
    expected = run("--json").stdout
    (tmp_path / "nni-experiments").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "abc123"
    for place in (folder, folder / "db" / "nni.sqlite"):
        assert run("--file", place, "--json").stdout == expected
    (tmp_path / "moved").rename(tmp_path / "nni-experiments")
    listed = tmp_path / "nni-experiments" / ".experiment"
    moved = {"abc123": {"status": "DONE", "startTime": 1000, "logDir": "/before/it/was/moved"}}
    for content in (json.dumps(moved), "{}"):
        listed.write_text(content)
        assert run("abc123", "--json").stdout == expected


def test_a_database_in_use_is_read_and_a_locked_damaged_or_missing_one_is_an_error(run, mixed):
    with contextlib.closing(sqlite3.connect(mixed, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # a writer, who lets others read
        assert run().returncode == 0
        connection.execute("ROLLBACK")
        connection.execute("BEGIN EXCLUSIVE")
        assert f"cannot read {mixed}: database is locked" in refusal(run())
    mixed.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    assert f"cannot read {mixed}" in refusal(run())
    mixed.unlink()
    assert f"cannot read {mixed}: unable to open" in refusal(run())
    assert not mixed.exists()


def test_a_trial_is_chosen_from_the_search_in_docs(run):
    search = files.read_file(ROOT / "docs" / "searches" / "wide.json")
    trials = [trial for trial in search["trials"] if trial.has_result]
    assert [choose.choose(trials, within).number for within in (0, 0.5, 1)] == [4, 21, 21]
    printed = run("--file", ROOT / "docs" / "searches" / "wide.json").stdout
    assert "* the choice, trial 21 (" in printed  # by this project's half a point


# Searches of other projects


def test_the_direction_is_the_tuners_or_the_users(run, tmp_path):
    entries = [trial(0, 0.3), trial(1, {"default": 0.1}), trial(2, 0.2)]
    database(tmp_path, entries, tuner={"name": "TPE"})

    def order(*args):
        printed = run(*args).stdout.splitlines()
        return [line.replace("*", "").split()[1] for line in printed[2:5]], printed[-2]

    least, rule = order()
    assert least == order("--minimize")[0] == ["0.1", "0.2", "0.3"]
    assert "within 0.5 of the least result" in rule
    assert order("--maximize")[0] == least[::-1]
    record = json.loads(run("--json").stdout)
    assert (record["direction"], record["trials"][1]["result"]) == ("minimize", 0.1)
    (tmp_path / "results.json").write_text(json.dumps(record | {"direction": "up"}))
    assert "direction is 'up'; allowed: " in refusal(run("--file", "results.json"))
    (tmp_path / "results.json").write_text(json.dumps(record | {"direction": None}))
    printed = run("--file", "results.json").stdout
    assert "The greatest result counts as the best, since no optimize_mode is known" in printed
    assert "counts as the best" not in run("--file", "results.json", "--minimize").stdout


ARRAY = {"__ndarray__": 0.75, "dtype": "float64", "shape": []}  # a NumPy number
RESULTS = [(1, 1.0), (True, 1.0), ({"default": 2, "other": "x"}, 2.0), ({"default": ARRAY}, 0.75)]
NO_RESULTS = ["0.5", None, float("nan"), float("-inf"), 10**400, -(10**400), [0.5], {"loss": 0.5}]
NO_RESULTS += [ARRAY | {"shape": [1]}, {"__nni_obj__": "gAWV"}, {"default": {"default": 1}}]


@pytest.mark.parametrize(("value", "expected"), [*RESULTS, *((v, None) for v in NO_RESULTS)])
def test_results_are_finite_numbers_or_objects_with_a_default(value, expected):
    assert results.number(value) == expected
    result, instead = results.read_result(json.dumps(value))
    assert (result is None) == (instead is not None)
    assert (instead == "a Python object, such as a tensor") == ("gAWV" in str(value))


@pytest.mark.parametrize("id", ["trialJobId", "id"])  # of NNI 2, and of NNI 1
def test_nnictls_export_is_read_like_the_database(run, tmp_path, id):
    values = ['"high"', "0.5", '{"default": 0.75}', "1" + "0" * 400, 0.25, {"default": 1}]
    exported = [
        {id: f"id{n}", "value": value, "parameter": {}, "intermediate": ["1", value]}
        for n, value in enumerate(values)
    ]
    (tmp_path / "out.json").write_text(json.dumps(exported))
    trials = json.loads(run("--file", "out.json", "--json").stdout)["trials"]
    assert [entry["id"] for entry in trials] == [f"id{n}" for n in range(6)]
    assert [entry["result"] for entry in trials] == [None, 0.5, 0.75, None, 0.25, 1]
    assert [entry["intermediate"] for entry in trials] == [[1.0]] * 6


def test_unusual_names_and_values_are_shown_in_one_line(run, tmp_path):
    escape = "\x1b[2J\u202e\x9b"
    odd = {f"key{escape}": f"value{escape}\n2", "list": [1, {"a": None}], "none": None}
    odd |= {"long": "é" * 9999, "augment": "token=cutout,  secret: x"}
    entries = [trial(0, 1.0, **odd), trial(1, f"no{escape}"), trial(2, 1.0, seconds=-3570)]
    entries.append(trial(3, 0.5) | {"hyperparameters": [1, "x"]})
    database(tmp_path, entries, experimentName=None)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"}
    command = [sys.executable, ROOT / "choose.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '[1, "x"]' in result.stdout
    assert result.stdout.splitlines()[0] == "abc123"
    assert max(map(len, result.stdout.splitlines()[:4])) < 400
    assert "* the choice, trial 0 " in result.stdout  # the other one's duration is not known
    shown = [result, run("--json"), run("--out", "best.json", "--top", 1)]
    database(tmp_path, [trial(0, f"no{escape}")], f"bad{escape}", 2000, experimentName=escape)
    shown.append(run())
    assert "none of 1 trials has a result" in shown[-1].stderr
    for result in shown:
        text = (result.stdout + result.stderr).replace("\n", "")
        assert text.isprintable(), [char for char in text if not char.isprintable()]
    assert json.loads((tmp_path / "best.json").read_text())["hyperparameters"] == odd | {"lr": 0.01}


def test_a_closed_pipe_gives_no_traceback(tmp_path):
    database(tmp_path, [trial(number, float(number)) for number in range(3000)])
    command = f"set -o pipefail; {sys.executable} {ROOT / 'choose.py'} --top 3000 | head -1"
    home = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run(["bash", "-c", command], env=home, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("abc123: a search\n", "")


# The direction


OPTUNA = "nnisearch.tuners.OptunaTuner"


@pytest.mark.parametrize(
    ("tuner", "mode", "line"),
    [
        ({"name": "tpe"}, "minimize", "^The least .*; for the greatest: classArgs: {optimize"),
        ({"name": "Anneal", "classArgs": None}, "minimize", "mode: maximize} under tuner$"),
        ({"name": "Evolution"}, "maximize", "^The greatest .*; for the least: .*: minimize} under"),
        ({"name": "MetisTuner"}, "maximize", "the best; "),
        ({"className": "nni.algorithms.hpo.tpe_tuner.TpeTuner"}, "minimize", "^The least "),
        ({"className": OPTUNA}, "maximize", "^The greatest "),
        ({"className": "mine.TpeTuner"}, None, "^The greatest .*, since no optimize_mode is known"),
        ({"name": "Random"}, None, "no optimize_mode .*classArgs: {optimize_mode: minimize} under"),
        ({"name": "BatchTuner"}, None, "for the least: nnichoose abc --minimize$"),
        ({"name": "Random", "classArgs": {"optimize_mode": "minimize"}}, "minimize", "^The least "),
    ],
)
def test_the_direction_is_read_from_the_tuner_and_told(tmp_path, tuner, mode, line):
    params = {"tuner": tuner}
    assert direction(params, tmp_path) == mode
    assert re.search(line, explanation(params, tmp_path, "nnichoose abc"))
    (tmp_path / "log").mkdir()
    for noted in ("minimize", "maximize"):  # as the tuner has said itself
        (tmp_path / "log" / "direction").write_text(noted)
        assert direction(params, tmp_path) == noted
    (tmp_path / "log" / "direction").write_text("")
    assert direction(params, tmp_path) == mode


# Importance


def test_the_importance_is_shown_from_ten_trials(fonts, run, tmp_path):
    def entry(number):
        x = number % 7 / 7
        odd = {"list": [[1], [2, 3]][number % 2], "none": None, "same": 1, "text": f"t{number}"}
        if number % 3:
            odd["sometimes"] = number % 4
        return trial(number, 10 * x + 0.01 * (number % 5), lr=x, **{"batch size": number % 3} | odd)

    shares = importance.importances([files.imported(entry(number)) for number in range(40)])
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.8
    assert set(shares) == {"lr", "batch size", "list", "sometimes"}
    assert sum(shares.values()) == pytest.approx(1)
    assert importance.importances([files.imported(entry(number)) for number in range(9)]) == {}
    alike = [results.Trial(number, "", result=1.0) for number in range(20)]
    assert importance.importances(alike) == {}

    database(tmp_path, [entry(number) for number in range(10)])
    result = run("--plot", "a.png")
    assert "Importance, by 10 trials: lr " in result.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# Written files


def test_a_written_file_is_complete_or_unchanged(tmp_path, monkeypatch):
    path, victim = tmp_path / "best.json", tmp_path / "victim"
    victim.write_text("mine")
    path.symlink_to(victim)
    mask = os.umask(0o027)
    try:
        output.write(path, b"new")
    finally:
        os.umask(mask)
    assert (path.read_bytes(), victim.read_text()) == (b"new", "mine")
    assert path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.write(path, b"newer")
    assert path.read_bytes() == b"new"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, victim.name}


def test_ctrl_c_gives_no_traceback(run, monkeypatch):
    monkeypatch.setattr(choose, "show", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    result = run()
    signal.signal(signal.SIGINT, before)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")
