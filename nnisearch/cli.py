"""Start any search of NNI, and watch it to its end.

    nnisearch CONFIG           # start a search, watch it, and choose a trial at its end
    nnisearch --resume ID      # continue a stopped search, or watch a running one
    nnisearch --view ID        # show a stopped search in the Web UI

CONFIG may be any configuration of NNI, of any project. A search that cannot work is refused in one
line and leaves nothing behind. A search is closed to other users (access.js), and continues when
this command ends. nnictl can handle it like any experiment.
"""

import contextlib
import ipaddress
import os
import platform
import shutil
import socket
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnisearch.shared import signals
from nnisearch.shared.imports import without_pandas

with signals.silently_interrupted(), without_pandas():  # NNI takes half a second
    import nni
    from nni.experiment.config import ExperimentConfig

    from nnisearch import elsewhere
    from nnisearch.before import checks
    from nnisearch.before import config as configuration
    from nnisearch.results import choose
    from nnisearch.shared.output import Parser, as_path, may_be_closed, prepare_output
    from nnisearch.shared.text import one_line
    from nnisearch.start import resume
    from nnisearch.start.launch import Experiment, launch, prepare_environment
    from nnisearch.start.logs import Logs
    from nnisearch.start.watchdog import Watchdog
    from nnisearch.watch import first_trials, progress

EXPERIMENT_SIZE = 50  # MB on the disk: logs and database of a long search
LIST_SIZE = 1  # MB: NNI loses its list of experiments if the disk is full
LONGEST = 480  # bytes of a folder's name; SQLite cannot open a longer path below it


@dataclass
class Project:
    """Settings of a project's own command, such as search.py; the defaults are nnisearch's own.

    command starts a search, and choose_command chooses a trial. default_config() returns the path
    of the default configuration, and the reason for it; default names it in --help. check(config)
    raises ValueError for what the project's trial refuses. load_data(config) loads what the trials
    would load. within is an argument of choose.main().
    """

    command: str = "nnisearch"
    choose_command: str = "nnichoose"
    default_config: Callable[[], tuple[Path, str]] | None = None
    default: str = ""
    check: Callable[[ExperimentConfig], None] = lambda config: None
    load_data: Callable[[ExperimentConfig], None] = lambda config: None
    within: float = 0.0


def check(config: ExperimentConfig, project: Project) -> None:
    """Check a search before its start, and load its data, so that no trial waits for a download.

    Raises ValueError for a search that cannot work, and prints what its user should know.
    """
    name_python(config)
    folder = Path(config.experiment_working_directory)
    if len(os.fsencode(folder)) > LONGEST:
        allowed = f"a path of at most {LONGEST} bytes, which SQLite can open"
        raise ValueError(f"experimentWorkingDirectory is '{folder}'; allowed: {allowed}")
    checks.check_disk(folder, EXPERIMENT_SIZE)
    for line in checks.check(config):
        print(f"Warning: {line}")
    project.check(config)
    project.load_data(config)


def name_python(config: ExperimentConfig) -> None:
    """Name the Python that runs the trials, if it is not the user's."""
    users, own = Path(shutil.which("python3") or sys.executable), Path(sys.executable)
    is_other = users.parent.resolve() != own.parent.resolve()
    if is_other and "python" in (config.trial_command or ""):
        change = f"to change that, write {users} in trialCommand, or install nnisearch there"
        print(f"In trialCommand python3 is {own.parent}/python3, as for this command; {change}")


def begin(args: Namespace, project: Project, check: Callable) -> tuple:
    """Check and start the search that args ask for; return its ID, port and configuration."""
    listed = resume.list_experiments()
    if id := args.resume or args.view:
        entry = resume.find(id, listed, "--view" if args.view else "--resume")
        is_up = entry["status"] != "STOPPED" if args.view else resume.is_running(entry)
        if is_up:
            if args.listen:
                allowed = "only at a start, and this search already runs"
                raise ValueError(f"--listen is {args.listen}; allowed: {allowed}")
            if args.port not in (None, entry["port"]):
                raise ValueError(f"--port is {args.port}; allowed: {entry['port']}, where it runs")
            return id, entry["port"], resume.running_config(entry)
    home = Path("~/nni-experiments").expanduser()
    checks.check_disk(home, LIST_SIZE, "NNI's folder below HOME")
    resume.close_list(home)
    checks.check_private(home, "NNI's folder below HOME")
    experiment = stored(entry, args) if id else new(args, project)
    if not args.view:
        check(experiment.config, project)
    # Trials use this python3 even if its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return experiment.id, start(experiment, args), experiment.config


def new(args: Namespace, project: Project) -> Experiment:
    """Return an experiment of the configuration in args, or of the project's default one."""
    path, reason = (args.config, args.config) if args.config else project.default_config()
    print(f"Configuration: {one_line(reason)}")
    config, lines = configuration.load(path)
    for line in lines:
        print(one_line(line))
    return Experiment(config)


def stored(entry: dict, args: Namespace) -> Experiment:
    """Return a stored experiment that is to be viewed or resumed; entry is of NNI's list."""
    id, folder = entry["id"], entry["logDir"]
    config = configuration.load_stored(id, Path(folder, id))
    config.experiment_working_directory = folder
    return Experiment(config, id, "view" if args.view else "resume")


def start(experiment: Experiment, args: Namespace) -> int:
    """Start an experiment, and wait until its first trials show that it works; return its port."""
    config, folder, is_new = experiment.config, experiment.folder, experiment.action == "create"
    over_there = None
    with (
        Watchdog(folder, experiment.action) as watchdog,
        first_trials.noticing_readers(folder / "trials") as readers,
    ):
        logs = Logs(config, folder)
        if not args.view:
            checks.check_private(folder.parent)  # the watchdog has made it by now
            over_there = elsewhere.prepare(config, experiment.id, folder, not is_new)
        prepare_environment(args.listen, args.host, over_there)
        port = launch(experiment, args.port, watchdog, logs)
        if not args.view:
            only_tuner = args.keep_going or not is_new  # a resumed search has run before
            seen = None if over_there else readers
            try:
                waiting = first_trials.watch(config, folder, port, logs, seen, only_tuner)
            except ValueError:
                checks.check_disk(folder, EXPERIMENT_SIZE)  # a full disk may be the cause
                raise
            if args.detach:  # otherwise progress.watch() prints these
                for line in progress.Notices(config, folder).new(waiting):
                    print(line)
    with contextlib.suppress(OSError):  # NNI's link for its users; no program needs it
        link = folder.with_name("_latest")
        link.unlink(missing_ok=True)
        link.symlink_to(experiment.id)
    return port


def parse_args(argv: list[str] | None, prog: str, project: Project) -> Namespace:
    """Return the command's settings. Exits with one line on stderr if they are not allowed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    group = parser.add_mutually_exclusive_group(required=not project.default_config)
    either = group.add_argument
    what = "a configuration of NNI" + (f" (default: {project.default})" if project.default else "")
    either("config", nargs="?", type=as_path, metavar="CONFIG", help=what)
    either("-c", "--config", dest="named", type=as_path, metavar="CONFIG", help="the same")
    add("-p", "--port", type=int, help="port of the Web UI (default: the first free one from 8090)")
    add("--detach", action="store_true", help="return once the first trials run")
    add("--keep-going", action="store_true", help="start the search even if its first trials fail")
    add("--listen", metavar="ADDRESS", help="open the Web UI to everybody who reaches this address")
    hosts = "a host name by which they reach it, if it is no IP address; may be repeated"
    add("--host", metavar="NAME", action="append", default=[], help=hosts)
    either("--resume", metavar="ID", help="continue a stopped search, or watch a running one")
    either("--view", metavar="ID", help="show a stopped search in the Web UI, without changing it")
    args = parser.parse_args(argv[1:] if argv[:1] == ["create"] else argv)  # nnictl's users type it
    args.config = args.config or args.named
    if args.port is not None and not 1 <= args.port < 65_536:
        parser.error(f"--port is {args.port}; allowed: 1 to 65535")
    if args.host and not args.listen:
        parser.error(f"--host is {args.host[0]}; allowed: none, without --listen")
    if args.listen:
        try:
            with socket.socket() as probe:
                probe.bind((str(ipaddress.IPv4Address(args.listen)), 0))
        except (OSError, ValueError):
            allowed = "an IPv4 address of this machine, or 0.0.0.0 for all of them"
            parser.error(f"--listen is {args.listen}; allowed: {allowed}")
    return args


@may_be_closed()
def main(
    argv: list[str] | None = None,
    project: Project = Project(),  # noqa: B008 - it does not change
    check: Callable[[ExperimentConfig, Project], None] = check,
) -> int:
    """Start a search and watch it. Return 0 if it is done and has a result, else 1."""
    prepare_output()
    prog = project.command.removeprefix("python ")
    args = parse_args(argv, prog, project)
    nni.silence_stdout()  # NNI prints addresses that other machines cannot reach
    signals.end_by_exit()
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{direct},localhost,127.0.0.1,::1".strip(",")
    try:
        id, port, config = begin(args, project, check)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{prog}: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted; no search has started")
    again = f"{project.command} --resume {id}"
    try:
        show_address(id, port, config, args.listen)
        if args.detach or args.view:
            return 0
        has_result = progress.watch(id, port, config, again, f"{project.choose_command} {id}")
    except RuntimeError as error:
        sys.exit(f"{prog}: error: {one_line(error)}")
    except KeyboardInterrupt:
        print(f"\nThe search continues. To watch it again: {again}")
        return 1
    if has_result:
        choose.main([id], within=project.within, was_watched=True)
        print(f"To keep the choice: {project.choose_command} {id} --out best.json")
    return 0 if has_result else 1


def show_address(id: str, port: int, config: ExperimentConfig, listen: str | None) -> None:
    """Print where the Web UI of a started search is, and who can use it."""
    print(f"Search {id}: {one_line(config.experiment_name or 'without a name')}")
    host = listen if listen not in (None, "0.0.0.0") else "127.0.0.1"
    print(f"Web UI: http://{host}:{port}, until: nnictl stop {id}")
    if listen:
        reach = f"everybody who reaches {listen}:{port} can run any command as you"
        print(f"Warning: {reach}, because of --listen")
    elif "microsoft" in platform.release().lower():
        print("Processes of root can use it, too: in WSL, Windows' browser comes through one")


if __name__ == "__main__":
    sys.exit(main())
