"""Undo the start of a search as soon as the standard input closes, unless that has said a word.

    python undo.py FOLDER ACTION LATEST

The command that starts a search holds the other end, so what it has started ends with it, also by
kill -9: a manager that NNI has not listed yet would run on without anybody knowing. The arguments
are start.undo()'s.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    has_ended = sys.stdin.read()
    if not has_ended:
        from nnisearch.shared.imports import without_pandas
        from nnisearch.shared.output import remove

        with without_pandas():  # not at the top: NNI takes half a second
            from nnisearch.start.launch import undo

        folder, action, latest = sys.argv[1:]
        folder = Path(folder)
        undo(folder, action, latest)
        if action == "create":
            remove(folder)
