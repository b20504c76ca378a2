"""Run a command, and end it if the launcher dies; exit with the command's status.

    python leash.py FOLDER COMMAND ...

The launcher holds the other end of the standard input, which closes when it dies, even by kill -9.
Then this process ends the command with all its children, and removes FOLDER. If the launcher has
written a byte before, FOLDER stays. After signal N the status is 128 + N, as in a shell.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    given = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, close_fds=False, **given)  # the tuner inherits a socket
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder
    from nnisearch.shared.output import remove
    from nnisearch.shared.processes import stop

    received = []

    def end_with_the_launcher():
        received.append(os.read(sys.stdin.fileno(), 1))
        stop(process.pid, folder)

    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    status = process.wait()
    stop(process.pid, folder)  # the children that it has left
    if received == [b""]:
        remove(folder)
    sys.exit(status if status >= 0 else 128 - status)
