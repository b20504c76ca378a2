"""Compare a search on machines over SSH with the same trials on one machine, in turn.

    python bench/machines.py            # 18 trials of 3 s, some 2 minutes; needs sshd

The machines are loopback addresses, each with an sshd of its own. The tests use them, too.
"""

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import psutil
from experiment import ROOT, UNCHECKED, Experiment

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
PASSPHRASE = "correct horse"
TRIAL = "sleep 3"  # NNI takes the rest of a trial's time
SPACE = {"rate": {"_type": "uniform", "_value": [0, 1]}}


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


def measure(name, trials, workers, **changes):
    """Run a search with this number of workers, and print its row of the table."""
    changes |= {"trialConcurrency": workers, "maxTrialNumber": trials, "searchSpace": SPACE}
    changes |= {"trialCommand": TRIAL, "tuner": {"name": "Random"}}
    with tempfile.TemporaryDirectory() as home:
        search = Experiment(ROOT / "configs/demo.yml", Path(home), os.environ, UNCHECKED, **changes)
        try:
            ended = search.wait(1200)
        finally:
            search.stop()
            shutil.rmtree(f"/tmp/nni-{search.id}", ignore_errors=True)
    starts, ends = (sorted(t[key] / 1000 for t in ended) for key in ("startTime", "endTime"))
    gaps = [start - end for start, end in zip(starts[workers:], ends[:-workers], strict=True)]
    seconds = median((t["endTime"] - t["startTime"]) / 1000 for t in ended)
    cells = f"{ends[-1] - starts[0]:.1f} | {seconds:.2f} | {mean(gaps):.2f} | {max(gaps):.2f}"
    print(f"| {name} | {cells} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=18, help="per row")
    parser.add_argument("--machines", type=int, default=3, help="machines, and trials at a time")
    args = parser.parse_args()
    print("| | seconds in all | median trial, s | end to next start, s | at most, s |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        key = Path(folder, "key")
        make_key(key, PASSPHRASE)
        machines = []
        for number in range(args.machines):
            address = f"127.0.0.{2 + number}"
            machines.append(Machine(address, Path(folder, address), key, {"HOME": folder}))
            stack.callback(machines[-1].die)
        service = {"platform": "remote", "reuseMode": True}
        service["machineList"] = [machine.settings for machine in machines]
        remote = {"trainingService": service, "nniManagerIp": "127.0.0.1"}
        for _ in range(2):
            measure("one machine", args.trials, args.machines)
            measure(f"{args.machines} over SSH", args.trials, args.machines, **remote)


if __name__ == "__main__":
    main()
