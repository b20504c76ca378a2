"""Start any search of NNI, and watch it to its end.

    nnisearch CONFIG           # start a search, watch it, and choose a trial at its end
    nnisearch --resume ID      # continue a stopped search, or watch a running one
    nnisearch --view ID        # show a stopped search in the Web UI

CONFIG may be any configuration of NNI, of any project. A search that cannot work is refused in one
line and leaves nothing behind. A search is closed to other users (access.js), and continues when
this command ends. nnictl can handle it like any experiment.
"""

import ipaddress
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnisearch.shared import signals
from nnisearch.shared.imports import without_pandas

with signals.silently_interrupted(), without_pandas():  # NNI takes half a second
    import nni
    from nni.experiment import Experiment

    from nnisearch.before import checks, gpus
    from nnisearch.before import config as configuration
    from nnisearch.before.rehearsal import rehearse
    from nnisearch.elsewhere import prepare
    from nnisearch.results import choose
    from nnisearch.shared.output import Parser, as_path, may_be_closed, prepare_output, remove
    from nnisearch.shared.text import one_line
    from nnisearch.start import resume
    from nnisearch.start.launch import experiment_folder, launch, prepare_environment
    from nnisearch.watch import progress

EXPERIMENT_SIZE = 50  # MB on the disk: logs and database of a long search
LIST_SIZE = 1  # MB: NNI loses its list of experiments if the disk is full


@dataclass
class Project:
    """Settings of a project's own command, such as search.py; the defaults are nnisearch's own.

    command starts a search, and choose_command chooses a trial. default_config() returns the path
    of the default configuration, and the reason for it. check(config) raises ValueError for what
    the project's trial refuses. within is an argument of choose.main().
    """

    command: str = "nnisearch"
    choose_command: str = "nnichoose"
    default_config: Callable | None = None
    check: Callable = lambda config: None
    within: float = 0.0


def begin(args, project):
    """Check and start the search that args ask for; return its ID, port and configuration."""
    listed = resume.list_experiments()
    if id := args.resume or args.view:
        known = resume.find(id, listed, "--view" if args.view else "--resume")
        is_up = known["status"] != "STOPPED" if args.view else resume.is_running(known)
        if is_up:
            if args.listen:
                allowed = "only at a start, and this search already runs"
                raise ValueError(f"--listen is {args.listen}; allowed: {allowed}")
            return id, known["port"], resume.running_config(known)
    home = Path("~/nni-experiments").expanduser()
    checks.check_disk(home, LIST_SIZE, "NNI's folder below HOME")
    resume.close_list(home)
    checks.check_private(home, "NNI's folder below HOME")
    experiment = stored(known, args) if id else new(args, project)
    port = start(experiment, args, project)
    return experiment.id, port, experiment.config


def new(args, project):
    """Return an experiment of the configuration in args, or of the project's default one."""
    path, reason = (args.config, args.config) if args.config else project.default_config()
    print(f"Configuration: {one_line(reason)}")
    return Experiment(configuration.load(path))


def stored(known, args):
    """Return a stored experiment that is to be viewed or resumed."""
    id, folder = known["id"], known["logDir"]
    experiment = Experiment(configuration.load_stored(id, Path(folder, id)))
    experiment.id, experiment._action = id, "view" if args.view else "resume"
    experiment.config.experiment_working_directory = folder
    return experiment


def start(experiment, args, project):
    """Check and start an experiment; return its port. Raises what checks and launch() raise."""
    config = experiment.config
    if args.view:
        with experiment_folder(experiment) as watchdog:
            prepare_environment(config, args.listen)
            return launch(experiment, args.port, watchdog)
    is_scheduled = configuration.is_local(config) and config.trial_gpu_number
    if is_scheduled and (line := gpus.allow_visible(config.training_service)):
        print(line)
    checks.check_disk(Path(config.experiment_working_directory), EXPERIMENT_SIZE)
    checks.check_private(Path(config.experiment_working_directory))
    with experiment_folder(experiment) as watchdog:
        folder = watchdog.folder
        if config.use_annotation:
            configuration.expand(config, folder / "code")
        for line in checks.check(config):
            print(f"Warning: {line}")
        project.check(config)
        elsewhere = prepare(config, experiment.id, folder, bool(args.resume))
        if args.rehearsal and not args.resume and not elsewhere:  # a resumed search has run before
            try:
                rehearse(config, folder / "rehearsal", watchdog)
            except (ValueError, OSError):
                checks.check_disk(folder, EXPERIMENT_SIZE)  # a full disk may be the cause
                raise
            remove(folder / "rehearsal")
        if is_scheduled and (holders := gpus.waiting_for(config.training_service)):
            print(f"All GPUs are busy, so the trials will wait: {holders}")
        prepare_environment(config, args.listen, elsewhere)
        return launch(experiment, args.port, watchdog)


def parse_args(argv, prog, project):
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("config", nargs="?", type=as_path, metavar="CONFIG", help="a configuration of NNI")
    add("-p", "--port", type=int, help="port of the Web UI (default: the first free one from 8090)")
    add("--detach", action="store_true", help="return once the search has started")
    add("--listen", metavar="ADDRESS", help="open the Web UI to everybody who reaches this address")
    add("--resume", metavar="ID", help="continue a stopped search, or watch a running one")
    add("--view", metavar="ID", help="show a stopped search in the Web UI, without changing it")
    add(
        "--no-rehearsal",
        dest="rehearsal",
        action="store_false",
        help="do not try the tuner and the trial first (if a trial must not run twice)",
    )
    args = parser.parse_args(argv)
    if not (args.config or args.resume or args.view or project.default_config):
        parser.error("CONFIG is missing; allowed: a configuration of NNI, --resume, --view")
    if args.config and (args.resume or args.view):
        parser.error(f"CONFIG is {args.config}; allowed: none, with --resume or --view")
    if args.resume and args.view:
        parser.error(f"--view is {args.view}; allowed: none, with --resume")
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


@may_be_closed()
def main(argv=None, project=Project()):  # noqa: B008 - it does not change
    """Start a search and watch it. Return 0 if it is done and has a result, else 1."""
    prepare_output()
    prog = project.command.removeprefix("python ")
    args = parse_args(argv, prog, project)
    nni.silence_stdout()  # NNI prints addresses that other machines cannot reach
    signals.end_by_exit()
    # Trials use this python3 even if its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{direct},localhost,127.0.0.1,::1".strip(",")
    try:
        id, port, config = begin(args, project)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{prog}: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted; no search has started")
    again = f"{project.command} --resume {id}"
    try:
        host = args.listen if args.listen not in (None, "0.0.0.0") else "127.0.0.1"
        print(f"Search {id}: {one_line(config.experiment_name or 'without a name')}")
        print(f"Web UI: http://{host}:{port}, until: nnictl stop {id}")
        if args.listen:
            reach = f"everybody who reaches {args.listen}:{port} can run any command as you"
            print(f"Warning: {reach}, because of --listen")
        elif not Path("/proc/net/tcp").exists():
            print("Other users of this machine can use it, too, because it has no /proc")
        elif "microsoft" in platform.release().lower():
            print("Processes of root can use it, too: in WSL, Windows' browser comes through one")
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


if __name__ == "__main__":
    sys.exit(main())
