"""Undoes a start if the launcher dies before it has finished.

    python undo.py FOLDER ACTION

FOLDER is the experiment's, ACTION is that of launch.undo(). The launcher holds the other end of the
standard input, which closes when it dies, even by kill -9: otherwise a manager that NNI has not
listed yet would run unnoticed. The launcher's last line tells what it was doing: "run PID" for a
command in a session of its own, "start LATEST" for NNI's manager, "done" at its end.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    folder, action = Path(sys.argv[1]), sys.argv[2]
    doing, _, what = ["", *sys.stdin.read().splitlines()][-1].partition(" ")
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
