"""Machines on loopback addresses of this one, each with an sshd of its own."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
PASSPHRASE = "correct horse"


def make_key(path, passphrase=""):
    # One round of key derivation: NNI's Node does nothing else meanwhile.
    rounds = ["-a", "1"]
    command = ["ssh-keygen", "-qt", "ed25519", *rounds, "-N", passphrase, "-f", path]
    subprocess.run(command, check=True)


class Machine:
    """A machine on a loopback address of its own: an sshd and the processes that it starts.

    settings is the machine's entry in machineList.
    """

    def __init__(self, address, folder, key, environment):
        self.folder = folder
        folder.mkdir()
        make_key(folder / "host")
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        settings = {
            "ListenAddress": address,
            "Port": port,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": key.with_suffix(".pub"),
            "StrictModes": "no",  # sshd would refuse a key in pytest's folders
            "PidFile": "none",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "Subsystem": "sftp internal-sftp",
            "SetEnv": " ".join(f"{name}={value}" for name, value in environment.items()),
        }
        (folder / "sshd").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # Debian's service would make it
        self.settings = {
            "host": address,
            "port": port,
            "user": getpass.getuser(),
            "sshKeyFile": str(key),
            "sshPassphrase": PASSPHRASE,
            "pythonPath": str(Path(sys.executable).parent),
        }
        self.start()

    def start(self):
        """Start the sshd, and wait until it answers."""
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", self.folder / "sshd"])
        for _ in range(600):
            address = (self.settings["host"], self.settings["port"])
            with contextlib.suppress(OSError), socket.create_connection(address):
                break
            time.sleep(0.1)

    def processes(self, part=""):
        """Return the sshd and its descendants, if their command contains part."""
        found = []
        with contextlib.suppress(psutil.Error):
            this = psutil.Process(self.process.pid)
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if part in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def signal(self, number):
        """Send a signal to the sshd and its descendants."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def die(self):
        """Kill the sshd and its descendants, as a loss of power would."""
        self.signal(signal.SIGKILL)
        self.process.wait(30)
