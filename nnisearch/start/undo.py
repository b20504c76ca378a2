"""Undoes a start if the launcher dies before it has finished.

    python undo.py FOLDER ACTION LATEST

The launcher holds the other end of the standard input, which closes when it dies, even by kill -9:
otherwise a manager that NNI has not listed yet would run unnoticed. If the launcher has written
before, nothing is undone. The arguments are those of launch.undo().
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    if not sys.stdin.read():
        from nnisearch.shared.imports import without_pandas
        from nnisearch.shared.output import remove

        with without_pandas():  # not at the top: NNI's import takes half a second
            from nnisearch.start.launch import undo

        folder, action, latest = sys.argv[1:]
        folder = Path(folder)
        undo(folder, action, latest)
        if action == "create":
            remove(folder)
