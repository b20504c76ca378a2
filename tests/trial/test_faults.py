"""A bad day: trials and managers that are killed, no room, no memory, a network that fails."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import tiny_cifar10
import torch
from conftest import ENDLESS, LIGHT_TRIAL, ROOT
from experiment import processes_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import LENGTHS, LOAD, names

import train
from trial.optimizers import LR_SCHEDULES, OPTIMIZERS

QUICK = ["--dataset", "synthetic", "--batch-size", "1000", "--epochs", "1"]

# train.py as a script, with the tiny data set, and a disk that takes a minute for half a file.
SLOW_DISK = f"""
import pathlib, runpy, sys, time
import tiny_cifar10, torch
tiny_cifar10.expect(pathlib.Path(sys.argv.pop(1)))
def half_written(content, file):
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
torch.save = half_written
sys.argv[0] = "train.py"
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture
def archive(tmp_path):
    """The archive of the tiny data set, in a folder of its own."""
    (tmp_path / "home").mkdir(exist_ok=True)
    return tiny_cifar10.write_archive(tmp_path / "home")


def killed_while_writing(start, number, *args):
    """Start train.py on the slow disk, send it the signal while it writes; return its status."""
    with start(*args, code=SLOW_DISK) as process:
        while "writing" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        process.communicate(timeout=60)
    return process.returncode


def test_a_trial_that_nni_kills_while_it_makes_the_cache_leaves_nothing(start, archive, tmp_path):
    folder = tmp_path / "data"
    tiny_cifar10.write(folder)
    assert killed_while_writing(start, signal.SIGTERM, archive, "--data-dir", folder) == 143
    assert names(folder) == ["cifar-10-batches-py", "cifar10.pt.lock"]


def test_after_a_sigkill_the_next_trial_makes_the_cache_and_tidies_up(
    start, run, archive, tmp_path
):
    folder = tmp_path / "data"
    tiny_cifar10.write(folder)
    assert killed_while_writing(start, signal.SIGKILL, archive, "--data-dir", folder) == -9
    assert not (folder / "cifar10.pt").exists()
    assert run(folder, archive, 0, code=LOAD).stdout == LENGTHS
    assert names(folder) == ["cifar-10-batches-py", "cifar10.pt", "cifar10.pt.lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_trial_that_is_killed_while_it_downloads(start, run, archive, tmp_path, number):
    folder = tmp_path / "data"
    code = "import pathlib, runpy, sys, tiny_cifar10\n"
    code += "tiny_cifar10.expect(pathlib.Path(sys.argv.pop(1)), sys.argv.pop(1))\n"
    code += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    with (
        tiny_cifar10.server(archive, stalls=True) as (port, _),
        start(archive, port, "--data-dir", folder, code=code) as process,
    ):
        while not list(folder.rglob(archive.name)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert names(folder) == ["cifar10.pt.lock"]
    with tiny_cifar10.server(archive) as (port, _):
        assert run(folder, archive, port, code=LOAD).stdout == LENGTHS
    assert names(folder) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "cifar10.pt",
        "cifar10.pt.lock",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_model_saved_before_outlives_a_trial_killed_while_it_saves(
    start, run, archive, tmp_path, number
):
    folder = tmp_path / "models"
    folder.mkdir()
    model = folder / "model.pt"
    assert run(*QUICK, "--save", model).returncode == 0
    before = model.read_bytes()
    killed_while_writing(start, number, archive, *QUICK, "--save", model)
    assert model.read_bytes() == before
    if number == signal.SIGTERM:
        assert names(folder) == ["model.pt"]
    assert run(*QUICK, "--save", model).returncode == 0


def test_a_data_folder_without_room_for_the_cache(run, archive, tmpfs):
    tiny_cifar10.write(folder := tmpfs(300))
    (folder / "fill").write_bytes(b"0" * (os.statvfs(folder).f_bavail * 4096 - 8192))
    result = run(folder, archive, 0, code=LOAD.replace("FileNotFoundError", "OSError"))
    assert result.returncode == 1
    assert f"cannot write {folder}/cifar10.pt: it takes 0.2 MB, and 0.0 MB are free" in (
        result.stderr
    )
    assert "Traceback" not in result.stderr
    assert names(folder) == ["cifar-10-batches-py", "cifar10.pt.lock", "fill"]
    (folder / "fill").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)
    assert run(folder, archive, 0, code=LOAD).stdout == LENGTHS


def test_a_data_folder_without_room_for_the_download(run, archive, tmpfs):
    folder = tmpfs(100)
    with tiny_cifar10.server(archive) as (port, _):
        result = run(folder, archive, port, code=LOAD)
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert f"Missing or damaged in {folder}/cifar-10-batches-py" in result.stderr
        assert "It takes 550 MB there, archive and cache included; 0 MB are free." in result.stderr
        assert "Traceback" not in result.stderr
        subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)
        assert run(folder, archive, port, code=LOAD).stdout == LENGTHS


def test_a_model_that_does_not_fit_on_the_disk(run, tmpfs):
    folder = tmpfs(100)
    result = run(*QUICK, "--save", folder / "model.pt")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith(f"train.py: error: cannot write {folder}/model.pt: it takes 0.2 MB, and")
    assert "Acc: " in result.stdout  # and has been reported
    assert names(folder) == []


def test_a_step_without_memory_names_the_batch_size(run):
    code = """
import resource, sys, train
addresses = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, [addresses + 600_000_000] * 2)
train.main(sys.argv[1:])
"""
    result = run("--dataset", "synthetic", "--batch-size", "10000", code=code)
    assert result.returncode == 1
    error = "train.py: error: batch_size is 10000; allowed: as many images as cpu has memory for"
    assert error in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_a_gpu_without_memory_names_the_batch_size(run):
    code = "import sys, torch, train; torch.cuda.set_per_process_memory_fraction(0.005)"
    flags = ["--dataset", "synthetic", "--batch-size", "10000"]
    result = run(*flags, code=f"{code}; train.main(sys.argv[1:])")
    assert result.returncode == 1
    assert "train.py: error: batch_size is 10000; allowed: as many images as cuda" in result.stderr
    assert "Traceback" not in result.stderr


def test_data_and_output_folders_with_all_kinds_of_names(run, archive, tmp_path):
    with contextlib.ExitStack() as stack:
        shared_memory = Path("/dev/shm")  # another file system than tmp_path's
        folders = [tmp_path / "with space", tmp_path / "数据", tmp_path / "link"]
        (tmp_path / "elsewhere").mkdir()
        folders[2].symlink_to(tmp_path / "elsewhere")
        if os.access(shared_memory, os.W_OK):
            folders.append(shared_memory / f"train.py test {os.getpid()}")
            stack.callback(shutil.rmtree, folders[-1], ignore_errors=True)
        code = f"""{LOAD}
import train
for folder in map(Path, {[str(folder) for folder in folders]}):
    for _ in range(2):  # what torchvision decodes, and the cache
        print([len(tensor) for tensor in data.load_cifar10(folder)])
    train.main(["--dataset", "synthetic", "--batch-size", "5000", "--epochs", "1",
                "--save", str(folder / "模型 1.pt")])
"""
        for folder in folders:
            tiny_cifar10.write(folder)
        result = run(folders[0], archive, 0, code=code)
        assert result.stdout.count(LENGTHS) == 1 + 2 * len(folders), result.stderr
        for folder in folders:
            assert names(folder)[-2:] == ["cifar10.pt.lock", "模型 1.pt"]


@pytest.mark.parametrize("how", ["stalls", "wrong"])
def test_a_download_that_stalls_or_is_another_file(run, archive, tmp_path, how):
    folder = tmp_path / "data"
    impatient = "import socket; wait = socket.setdefaulttimeout\n"
    impatient += "socket.setdefaulttimeout = lambda seconds: wait(seconds / 15)\n"
    with tiny_cifar10.server(archive, **{how: True}) as (port, _):
        result = run(folder, archive, port, code=impatient + LOAD)
    assert result.returncode == 1
    expected = {"stalls": "TimeoutError: timed out", "wrong": "File not found or corrupted"}
    assert f"What failed: {expected[how]}" in result.stderr.replace("RuntimeError: ", "")
    assert "Three ways on" in result.stderr
    assert "Traceback" not in result.stderr
    with tiny_cifar10.server(archive) as (port, _):
        assert run(folder, archive, port, code=LOAD).stdout == LENGTHS


def test_a_download_through_a_proxy(run, environment, archive, tmp_path):
    with tiny_cifar10.server(archive) as (port, requests):
        environment["http_proxy"] = f"http://127.0.0.1:{port}"
        environment["no_proxy"] = ""
        code = LOAD.replace(
            "tiny_cifar10.expect(archive, port)",
            "tiny_cifar10.expect(archive)\n"
            "tiny_cifar10.CIFAR10.url = 'http://nowhere.invalid/archive.tar.gz'",
        )
        result = run(tmp_path / "data", archive, 0, code=code)
    assert result.stdout == LENGTHS, result.stderr
    assert set(requests) == {"http://nowhere.invalid/archive.tar.gz"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "10"],
        ["--lr", "10", "--optimizer", "Muon"],
        ["--momentum", "0.999"],
        ["--batch-size", "10000"],
        ["--batch-size", "10001"],
        ["--batch-size", "50000"],
        ["--weight-decay", "1e30"],
        ["--augment", "16"],
        ["--lr-schedule", "one_cycle", "--batch-size", "10000"],
    ],
    ids=" ".join,
)
def test_hyperparameters_at_the_edges_give_a_number(run, flags):
    result = run(*QUICK, *flags)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert 0 <= float(last.removeprefix("Acc: ").split("%")[0]) <= 100


# What users and tuners may give, good or bad.
KEYS = st.sampled_from([*train.HYPERPARAMETERS, "layers", "batchsize", "seed", ""])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 300),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from([*OPTIMIZERS, *LR_SCHEDULES, "1e-3", "0x10", "1_000", "nan", "٣"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    flags=st.lists(st.tuples(KEYS, SCALARS), max_size=3),
    file=st.none() | st.dictionaries(KEYS, VALUES, max_size=3) | VALUES,
    tuned=st.dictionaries(KEYS, VALUES, max_size=3) | VALUES,
)
def test_hyperparameters_are_accepted_or_refused_in_one_line(tmp_path, capfd, flags, file, tuned):
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in flags]
    if file is not None:
        path = tmp_path / "params.json"
        path.write_text(json.dumps(file))
        argv += ["--params", str(path)]
    capfd.readouterr()
    try:
        args = train.parse_args(argv)
        train.set_hyperparameters(args, tuned, "tuner")
    except SystemExit as refusal:
        printed = capfd.readouterr().err
        assert refusal.code == 2
        assert printed.count("\n") == 1, printed
        assert "error: " in printed
        assert (
            "allowed" in printed or "expected one argument" in printed or "invalid int" in printed
        )
    except ValueError as refusal:
        assert str(refusal).startswith("tuner")
        assert "\n" not in str(refusal)
        assert "allowed" in str(refusal)
    else:
        for key, entry in train.HYPERPARAMETERS.items():
            assert type(getattr(args, key)) is entry.kind
            assert entry.allows(getattr(args, key))


def trial_processes(search, trial):
    """Return the processes of a trial: the shell that NNI starts, and Python."""
    found = []
    for process in processes_at(search.home):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NNI_TRIAL_JOB_ID") == trial["trialJobId"]:
                found += [process, process.parent()]
    return found


def test_a_search_goes_on_when_its_trials_are_killed(experiment):
    search = experiment(
        "configs/demo.yml",
        trialCommand=LIGHT_TRIAL,
        maxTrialNumber=5,
        trialConcurrency=4,
        searchSpace=ENDLESS,
    )
    trials = search.wait_for(
        lambda trials: len({m["trialJobId"] for m in search.get("metric-data")}) == 4, 180
    )
    processes = [trial_processes(search, trial) for trial in trials]
    assert all(processes)
    (terminated,) = {p for p in processes[0] if p.name().startswith("python")}
    terminated.terminate()
    (killed,) = {p for p in processes[1] if p.name().startswith("python")}
    killed.kill()
    search.nnictl("trial", "kill", search.id, "-T", trials[2]["trialJobId"])
    search.request("DELETE", f"trial-jobs/{trials[3]['trialJobId']}")  # as the Web UI does
    _, alive = psutil.wait_procs({p for ps in processes for p in ps}, timeout=60)
    assert alive == []

    by_id = {trial["trialJobId"]: trial["status"] for trial in trials}
    trials = search.wait_for(
        lambda trials: [t["status"] for t in trials if t["trialJobId"] not in by_id] == ["RUNNING"],
        60,
    )
    by_id = {trial["trialJobId"]: trial["status"] for trial in trials}
    assert sorted(by_id.values()) == ["FAILED"] * 2 + ["RUNNING"] + ["USER_CANCELED"] * 2
    assert search.stop() == []
