"""Start a search with NNI, as `nnictl create` does, but so that it starts, on any machine.

    python search.py                       # config.yml with GPUs, configs/cpu.yml without
    python search.py configs/demo.yml      # on any machine, nothing to download
    python search.py --resume ID           # go on with a stopped search, or watch one that runs

It promises: what cannot work is refused in one line and leaves nothing behind; nobody but its user
gets at the search (manager.js), which goes on when this command ends; and for nnictl it is an
experiment like any other. CONFIG may be any configuration of NNI, of any project.
"""

import argparse
import contextlib
import ipaddress
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import nni
import psutil
from nni.experiment import Experiment, RunMode, launcher, rest
from nni.experiment.config.utils import load_experiment_config
from nni.tools.nnictl.config_utils import Experiments
from nni.tools.nnictl.nnictl_utils import update_experiment

import checks
import choose
import progress

PORT = 8090
PATIENCE = 120  # seconds; NNI gives its web server 3


def default_config():
    """Return the project's configuration for this machine, and why it is that."""
    count = len(checks.gpus())
    name = "config.yml" if count else "configs/cpu.yml"
    return checks.ROOT / name, f"{name}, since nvidia-smi lists {count or 'no'} GPUs"


def is_free(port):
    """Return whether nothing on this machine listens on the port."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def find_port(wanted, count):
    """Return wanted, or by default the first port from PORT on, with count free ports from there.

    Raises ValueError, with who has it, if wanted is taken.
    """
    for port in [wanted] if wanted else itertools.count(PORT):
        if all(is_free(port + offset) for offset in range(count)):
            return port
    update_experiment()
    for id, known in Experiments().get_all_experiments().items():
        if known["port"] == wanted and known["status"] != "STOPPED":
            holder = (
                f"experiment {id} ({known['experimentName']}) has it: nnictl stop {id} ends that"
            )
            raise ValueError(f"--port is {wanted}; allowed: a free one; {holder}")
    raise ValueError(f"--port is {wanted}; allowed: a free one, with {count - 1} free after it")


def prepare_environment(config, listen):
    """Set what NNI's manager inherits: this Python for the trials, and manager.js for itself."""
    machines = getattr(config.training_service, "machine_list", None) or []
    found = [socket.getaddrinfo(machine.host, None) for machine in machines]
    guard = {
        "listen": listen,
        "machines": [place[4][0] for places in found for place in places],
        "nodeOptions": os.environ.get("NODE_OPTIONS", ""),
    }
    preload = json.dumps(str(checks.ROOT / "manager.js"))  # quoted: its path may have spaces
    # NNI's Node, of 2022, stumbles over today's openssl.cnf: then it takes no Ed25519 keys.
    own = f"--openssl-config=/dev/null --require {preload}"
    os.environ["NODE_OPTIONS"] = f"{guard['nodeOptions']} {own}"
    os.environ["NNI_GUARD"] = json.dumps(guard)


@contextlib.contextmanager
def patience():
    """Let NNI's launcher wait for the web server as long as its process lives, PATIENCE at most.

    NNI has no setting for that. Yields the list of the processes that the launcher has started.
    """
    started = []
    start, wait, timeout = launcher._start_rest_server, launcher._check_rest_server, rest.timeout

    def start_and_note(*args):
        started.append(start(*args))
        return started[-1]

    def wait_for_server(port, **_):
        server = psutil.Process(started[-1].pid)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and started[-1].poll() is None:
            with contextlib.suppress(psutil.Error):
                listening = [c.laddr.port for c in server.net_connections() if c.status == "LISTEN"]
                if port in listening:  # our own server, not another's that has the port
                    return
            time.sleep(0.1)
        state = "has ended" if started[-1].poll() is not None else f"is silent after {PATIENCE} s"
        raise RuntimeError(f"NNI's web server {state}")

    launcher._start_rest_server, launcher._check_rest_server = start_and_note, wait_for_server
    rest.timeout = PATIENCE
    try:
        yield started
    finally:
        launcher._start_rest_server, launcher._check_rest_server = start, wait
        rest.timeout = timeout


def start(experiment, port):
    """Start an experiment and return when its first trial is there, or the patience is over.

    Raises RuntimeError, with the manager's last words, if it fails; then nothing is left of it.
    """
    root = Path(experiment.config.experiment_working_directory)
    folder, latest = root / experiment.id, root / "_latest"
    is_new = not folder.exists()
    before = os.readlink(latest) if latest.is_symlink() else None
    with patience() as started:
        try:
            experiment.start(port, run_mode=RunMode.Detach)
            end = time.monotonic() + PATIENCE
            while not rest.get(port, "/trial-jobs") and time.monotonic() < end:
                status = rest.get(port, "/check-status")
                if status["status"] == "ERROR":
                    raise RuntimeError(f"NNI's tuner: {' '.join(status['errors'])}")
                time.sleep(0.1)
        except BaseException as error:
            for process in started:
                checks.stop(process)
            words = last_words(folder / "log")
            Experiments().update_experiment(experiment.id, "status", "STOPPED")
            if is_new:
                Experiments().remove_experiment(experiment.id)
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                latest.unlink()
                if before:
                    latest.symlink_to(before)
            if isinstance(error, Exception):
                raise RuntimeError(f"the search does not start: {error}: {words}") from error
            raise


def last_words(logs):
    """Return the last lines of the manager's stderr, and the errors in its and the tuner's log."""
    words = []
    for name, pattern in (
        ("nnictl_stderr.log", r"^(?!-+$|Experiment \w+ start).+"),
        ("nnimanager.log", r".*(?:ERROR|CRITICAL).*"),
        ("dispatcher.log", r".*(?:ERROR|CRITICAL).*"),
    ):
        with contextlib.suppress(OSError):
            text = (logs / name).read_text(encoding="utf-8", errors="replace")
            words += re.findall(pattern, text, re.MULTILINE)[-4:]
    return "\n".join(words)


def begin(args):
    """Check and start what args ask for; return the search's ID, its port and its configuration."""
    update_experiment()  # NNI's list: which experiments still run
    known = Experiments().get_all_experiments()
    if args.resume and args.resume not in known:
        allowed = ", ".join(known) or "none, since NNI lists no experiment"
        raise ValueError(f"--resume is {args.resume!r}; allowed: {allowed}")
    if args.resume and known[args.resume]["status"] != "STOPPED":
        port = known[args.resume]["port"]
        params = rest.get(port, "/experiment")["params"]
        return args.resume, port, load_experiment_config(params)
    if args.resume:
        config = launcher.get_stopped_experiment_config(args.resume)
    else:
        path, reason = (args.config, args.config) if args.config else default_config()
        print(f"Configuration: {reason}")
        config = checks.load(path)
    checks.check(config)
    is_local = checks.is_local(config)
    if is_local:
        if settings := checks.train_settings(config):
            import train  # not at the top: torch takes two seconds, which no other trial needs

            print("Loading the trials' data, which the first search downloads")
            train.load_data(settings)
        if config.trial_gpu_number and (holders := checks.waiting_for(config.training_service)):
            print(f"All GPUs are busy, so the trials will wait: {holders}")
    prepare_environment(config, args.listen)
    while True:
        port = find_port(args.port, 1 if is_local else 2)
        if not args.port and port != PORT:
            print(f"Port {PORT} is taken; {port} is the next free one")
        experiment = Experiment._resume(args.resume) if args.resume else Experiment(config)
        try:
            start(experiment, port)
        except RuntimeError:
            if args.port or is_free(port):
                raise
            continue  # another search has taken the port at the same moment
        return experiment.id, port, config


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage=argparse.SUPPRESS,  # an error is one line, without the usage above it
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="of NNI, v2 (default: config.yml or configs/cpu.yml)")
    add("-p", "--port", type=int, help="of the Web UI (default: the first free one from 8090 on)")
    add("--detach", action="store_true", help="return once the search has started")
    add("--listen", metavar="ADDRESS", help="open the Web UI to whoever reaches this address")
    add("--resume", metavar="ID", help="go on with a stopped search, or watch one that runs")
    args = parser.parse_args(argv)
    if args.config and args.resume:
        parser.error(f"CONFIG is {args.config}; allowed: none, with --resume")
    if args.port is not None and not 1 <= args.port < 65_535:
        parser.error(f"--port is {args.port}; allowed: 1 to 65534")
    if args.listen:
        try:
            with socket.socket() as probe:
                probe.bind((str(ipaddress.IPv4Address(args.listen)), 0))
        except (OSError, ValueError):
            allowed = "an IPv4 address of this machine, or 0.0.0.0 for all of them"
            parser.error(f"--listen is {args.listen}; allowed: {allowed}")
    return args


def main(argv=None):
    """Start a search and watch it. Returns 0 if it is done and has a result, else 1."""
    args = parse_args(argv)
    nni.silence_stdout()  # it names addresses that do not answer
    sys.stdout.reconfigure(line_buffering=True)  # also where it is no terminal
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # The trials' python3 is this one, also where its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{direct},localhost,127.0.0.1".strip(",")
    try:
        id, port, config = begin(args)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"search.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("search.py: interrupted; no search has started")
    try:
        host = args.listen if args.listen not in (None, "0.0.0.0") else "127.0.0.1"
        print(f"Search {id}: {config.experiment_name}")
        print(f"Web UI: http://{host}:{port}, until: nnictl stop {id}")
        if args.listen:
            print(f"Warning: whoever reaches {args.listen}:{port} can run any command as you")
        elif not Path("/proc/net/tcp").exists():
            print("Other users of this machine reach it, too: there is no /proc to tell them apart")
        if args.detach:
            return 0
        has_result = progress.watch(id, port, config)
    except RuntimeError as error:
        sys.exit(f"search.py: error: {error}")
    except KeyboardInterrupt:
        print(f"\nThe search goes on. To watch it again: python search.py --resume {id}")
        return 1
    if has_result and progress.best_of(config) is max:
        choose.main([id])
        print(f"To keep the choice: python choose.py {id} --out best.json")
    return 0 if has_result else 1


if __name__ == "__main__":
    sys.exit(main())
