"""End a process, and all that it has started, as soon as the standard input closes.

    python leash.py FOLDER

Its first line is the process's number. A search holds the other end, so what it has tried ends with
it, also by kill -9. FOLDER is what it leaves then; if more is written, it tidies up by itself.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    from nnisearch.shared.output import remove
    from nnisearch.shared.processes import stop

    folder = Path(sys.argv[1])
    pid = sys.stdin.readline()
    has_ended_well = sys.stdin.read()
    if pid:
        stop(int(pid), folder)
    if not has_ended_well:
        remove(folder)
