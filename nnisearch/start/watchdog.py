"""Undoes a start that fails, even if the command that starts is killed by kill -9.

    python -m nnisearch.start.watchdog LOCK FOLDER ACTION PARENT...

This process undoes a start if the command dies. It reads a pipe from the command, which closes when
the command dies. The last line in it tells how far the command was:

    (none)    it has made FOLDER, the experiment's, and the PARENTs
    start     it has started NNI's manager
    done      it has ended by itself, and has undone what it had to

LOCK is the descriptor of the lock of starts, which this process holds as long as the command does.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from nnisearch.shared.output import remove
from nnisearch.shared.place import runs_on_other_host
from nnisearch.shared.processes import end, manager_of, processes_of, stop
from nnisearch.shared.signals import uninterrupted

ROOT = Path(__file__).resolve().parents[2]


class Watchdog:
    """Makes an experiment's folder, and undoes a start if the block fails or is killed.

    action is "create", "resume" or "view"; only what was created is removed.
    """

    def __init__(self, folder, action):
        self.folder, self.action = folder, action
        self.made = [parent for parent in folder.parents if not parent.exists()]
        self.is_started = False

    def __enter__(self):
        from nnisearch.start.locks import START_LOCK

        lock = START_LOCK.expanduser()
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with uninterrupted():
            self.lock = lock.open("a")
            module = ["-m", "nnisearch.start.watchdog", str(self.lock.fileno())]
            self.process = subprocess.Popen(
                [sys.executable, *module, self.folder, self.action, *self.made],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[self.lock.fileno()],
                start_new_session=True,  # which Ctrl-C does not reach
            )
        try:
            # NNI creates folders in it that everybody may write to, and runs files from them.
            for parent in [*reversed(self.made), self.folder]:
                parent.mkdir(mode=0o700, exist_ok=True)
            self.folder.chmod(0o700)
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, error, *_):
        with uninterrupted():
            if error:
                self.undo()
                remove_made(self.folder, self.action, self.made)
            self.tell("done")
            with contextlib.suppress(OSError):
                self.process.communicate()
            self.lock.close()

    def note_start(self):
        """Note that NNI's manager is started next, with the lock of starts held."""
        self.is_started = True
        self.tell("start")

    def undo(self):
        """Undo the start of NNI's manager, if there was one."""
        if self.is_started:
            undo(self.folder, self.action, self.lock)

    def tell(self, line):
        with contextlib.suppress(OSError):  # the process has been killed
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()


def undo(folder, action, lock):
    """End the processes of a start, and restore NNI's list.

    The experiment is removed from the list if action is "create", and marked as stopped otherwise.
    """
    # Not at the top: NNI's import takes half a second, which the waiting process saves.
    from nnisearch.start.locks import held
    from nnisearch.start.patches import Experiments

    id = folder.name
    with held(lock):  # no other command resumes the experiment meanwhile
        if manager := manager_of(id):
            stop(manager.pid, folder)
        end(processes_of(id, folder))
        if action == "create":
            Experiments().remove_experiment(id)
        elif not runs_on_other_host(folder):  # another machine may just have resumed it
            Experiments().update_experiment(id, "status", "STOPPED")


def remove_made(folder, action, made):
    """Remove the folder of a new experiment, and the parents that were made for it."""
    if action == "create":
        remove(folder)
        with contextlib.suppress(OSError):  # another search may use a parent, too
            for parent in made:
                parent.rmdir()


def main():
    lock, folder, action, *made = sys.argv[1:]
    told = sys.stdin.read().split()
    if "done" in told:
        return
    from nnisearch.shared.imports import without_pandas

    folder = Path(folder)
    if "start" in told:
        with without_pandas(), open(int(lock)) as file:
            undo(folder, action, file)
    remove_made(folder, action, map(Path, made))


if __name__ == "__main__":
    main()
