"""Run a command until it ends, or until the standard input closes; exit with its status.

    python leash.py FOLDER COMMAND ...

The launcher holds the other end of the standard input. If the launcher dies, also by kill -9, this
ends the command and all that it has started, and removes FOLDER. If the launcher writes before it
closes, it tidies up FOLDER by itself. An end by signal N is status 128 + N, as in a shell.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    given = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, close_fds=False, **given)  # the tuner is given a socket
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    from nnisearch.shared.output import remove
    from nnisearch.shared.processes import stop

    heard = []

    def end_with_the_launcher():
        heard.append(os.read(sys.stdin.fileno(), 1))
        stop(process.pid, folder)

    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    status = process.wait()
    stop(process.pid, folder)  # what it has left
    if heard == [b""]:
        remove(folder)
    sys.exit(status if status >= 0 else 128 - status)
