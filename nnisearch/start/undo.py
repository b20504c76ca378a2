"""Undoes a start if the launcher dies. Otherwise its processes would run on, unknown to NNI.

    python undo.py FOLDER ACTION     # the arguments of launch.undo()

The standard input is a pipe from the launcher, which closes when the launcher dies, even by
kill -9. The last line in it tells what the launcher was doing:

    run PID          it ran a command in a session of its own
    start LATEST     it started NNI's manager; _latest was a link to experiment LATEST
    wait             neither
    done             it has ended by itself, and has undone what it had to
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    folder, action = Path(sys.argv[1]), sys.argv[2]
    lines = sys.stdin.read().splitlines() or ["wait"]
    doing, _, what = lines[-1].partition(" ")
    if doing == "run":
        from nnisearch.shared.processes import stop

        stop(int(what), folder)
    if doing == "start":
        from nnisearch.shared.imports import without_pandas

        with without_pandas():  # not at the top: NNI's import takes half a second
            from nnisearch.start.launch import undo

        undo(folder, action, latest=what)
    if doing != "done" and action == "create":
        from nnisearch.shared.output import remove

        remove(folder)
