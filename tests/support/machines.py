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


def make_key(path, passphrase="", kind="ed25519"):
    command = ["ssh-keygen", "-qt", kind, "-a", "1", "-N", passphrase, "-f", path]
    subprocess.run(command, check=True)


def make_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def make_ssh(folder, *lines):
    """Put an ssh into the folder that reads no file of this user's; return the folder.

    lines are for its configuration.
    """
    folder.mkdir(exist_ok=True)
    known = [f"UserKnownHostsFile {folder}/known_hosts", "GlobalKnownHostsFile none"]
    (folder / "ssh_config").write_text("\n".join([*lines, "Host *", *known, ""]))
    program = shutil.which("ssh", path="/usr/local/bin:/usr/bin:/bin")
    make_program(folder / "ssh", f'#!/bin/sh\nexec {program} -F {folder}/ssh_config "$@"\n')
    return folder


class Machine:
    """A machine on a loopback address of its own: an sshd and the processes that it starts.

    settings is the machine's entry in machineList; environment is that of its processes; how is for
    its sshd. ssh is make_ssh()'s folder.
    """

    def __init__(self, address, folder, key, ssh, environment=(), **how):
        self.folder = folder
        folder.mkdir()
        make_key(folder / "host")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        variables = {"HOME": folder} | dict(environment)
        settings = {
            "ListenAddress": address,
            "Port": port,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": key.with_suffix(".pub"),
            "StrictModes": "no",  # sshd would refuse a key in pytest's folders
            "PidFile": "none",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "SetEnv": " ".join(f"{name}={value}" for name, value in variables.items()),
        } | how
        (folder / "sshd").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
        with (ssh / "known_hosts").open("a") as known:
            known.write(f"[{address}]:{port} {(folder / 'host.pub').read_text()}")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # Debian's service would make it
        self.settings = {
            "host": address,
            "port": port,
            "user": getpass.getuser(),
            "sshKeyFile": str(key),
            "pythonPath": str(Path(sys.executable).parent),
        }
        self.start()

    def start(self):
        """Start the sshd, and wait until it answers."""
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", self.folder / "sshd"])
        address = (self.settings["host"], self.settings["port"])
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(address):
                break
            time.sleep(0.1)

    def processes(self, part=""):
        """Return the sshd and what it has started, if their command contains part."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_sshd = str(self.folder / "sshd") in process.cmdline()
                is_there = process.environ().get("HOME") == str(self.folder)
                if (is_sshd or is_there) and part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def signal(self, number, name=""):
        """Send a signal to the sshd, its connections and what it has started, if so named."""
        connections = []
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(self.process.pid).children(recursive=True)
        for process in {*self.processes(), *connections}:
            with contextlib.suppress(psutil.Error):
                if name in process.name():
                    process.send_signal(number)

    def die(self):
        """Kill the sshd and what it has started, as a loss of power would."""
        for _ in range(2):  # the second time what has been started meanwhile
            self.signal(signal.SIGKILL)
        self.process.wait(30)

    def left(self):
        """Return the files of searches that are there."""
        return [*self.folder.glob(".cache/nnisearch/*")]
