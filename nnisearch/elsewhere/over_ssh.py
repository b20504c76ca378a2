"""python3 over_ssh.py FOLDER: run a trial of NNI's local service on a machine of machineList.

FOLDER is the one that machines.py prepares. The trial waits for a free machine, and for free GPUs
there; over_there.py runs it, and sends its output, reports and files home. The trial's file
.nni/elsewhere tells elsewhere.js what happens: "TIME MACHINE" when the command begins over there,
and "lost WHY" if the machine is lost.
"""

import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

BEAT = 3  # s between two signs of life
SILENCE = 16  # s until a machine is lost; by then over_there.py has ended the trial
LOGIN = 30  # s
REST = 5  # s until a machine that is lost, or has no free GPU, is tried again
LONGEST_SOCKET = 85  # characters of a path; ssh adds 17, and Linux allows 107
MARK = b"\n<nnisearch>"  # a login shell may print something before it
START = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
PASSED = ["NNI_PLATFORM", "NNI_EXP_ID", "NNI_TRIAL_JOB_ID", "NNI_TRIAL_SEQ_ID"]


class Lost(Exception):
    """A machine refuses the connection or does not answer; the text says why.

    status is ssh's exit status, None if ssh has not ended.
    """

    def __init__(self, why, status=None):
        super().__init__(why)
        self.status = status


def ssh_command(folder, number, machine):
    """Return the ssh command for a machine, up to the command over there, and its environment."""
    answer, socket = folder / f"askpass{number}", folder / "state" / f"ssh{number}"
    is_short = len(str(socket)) <= LONGEST_SOCKET
    options = {"BatchMode": "no" if machine["secret"] else "yes", "NumberOfPasswordPrompts": 1}
    options |= {"ConnectTimeout": 10, "ServerAliveInterval": 5, "ServerAliveCountMax": 3}
    options |= {"ControlMaster": "auto" if is_short else "no", "ControlPersist": 30}
    options |= {"ControlPath": socket if is_short else "none", "LogLevel": "ERROR"}
    options |= {"RemoteCommand": "none", "ClearAllForwardings": "yes"}
    command = ["ssh", "-T", "-l", machine["user"]]
    if machine["port"] != 22:  # otherwise ~/.ssh/config may name one
        command += ["-p", str(machine["port"])]
    if machine["sshKeyFile"]:
        command += ["-i", machine["sshKeyFile"]]
        options["IdentitiesOnly"] = "yes"
    if answer.exists():  # a server that asks for the passphrase does not get it
        by_password = "password,keyboard-interactive"
        options["PreferredAuthentications"] = "publickey" if machine["sshKeyFile"] else by_password
    command += [f"-o{key}={value}" for key, value in options.items()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NNI_")}
    environment |= {"SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force"}
    environment.setdefault("DISPLAY", "none")  # OpenSSH before 8.4 asks for it
    return [*command, "--", machine["host"]], environment


def start_command(machine, flags):
    """Return a command that every login shell understands. It starts Python on the machine."""
    path = machine["pythonPath"] or ""
    before = f"PATH={shlex.quote(path)}:$PATH; " if path else ""
    if path.startswith("~/"):
        before = f'PATH="$HOME"{shlex.quote(path[1:])}:$PATH; '
    return f"exec /bin/sh -c {shlex.quote(f'{before}exec python3 {flags} -c {shlex.quote(START)}')}"


def name(machine):
    port = "" if machine["port"] == 22 else f":{machine['port']}"
    return f"machine {machine['user']}@{machine['host']}{port}"


class Connection:
    """ssh to a machine with over_there.py at its other end, which gets a task.

    number is the machine's in machines.json; errors is a file for what ssh says.
    """

    def __init__(self, folder, number, machine, task, errors):
        self.errors, self.lock = errors, threading.Lock()
        self.is_closed, self.must_stop = threading.Event(), threading.Event()
        command, environment = ssh_command(folder, number, machine)
        flags = "" if task["do"] == "try" else "-IS"  # faster, but without packages such as nni
        with errors.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, start_command(machine, flags)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,  # without a terminal to ask for a password
            )
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.frames = self.receive()
        there = Path(__file__).with_name("over_there.py").read_bytes()
        self.write(b"%d\n%b" % (len(there), there))
        self.send(b"t", json.dumps(task).encode())
        threading.Thread(target=self.beat, daemon=True).start()

    def write(self, data):
        with self.lock, contextlib.suppress(OSError):  # receive() tells if the connection ends
            while data and not self.is_closed.is_set():
                data = data[os.write(self.input, data) :]

    def send(self, kind, data=b""):
        self.write(kind + struct.pack(">I", len(data)) + data)

    def beat(self):
        while not self.must_stop.wait(BEAT):
            self.send(b".")
        self.send(b"s")
        while not self.is_closed.wait(BEAT):
            self.send(b".")

    def send_start(self, code, gpus):
        """Let the trial begin on these GPUs; code is an archive, or None if the code is there."""
        if code:
            with code.open("rb") as file:
                for data in iter(lambda: file.read(65536), b""):
                    self.send(b"c", data)
        self.send(b"v", gpus.encode())

    def read(self, seconds):
        if not select.select([self.output], [], [], seconds)[0]:
            raise Lost("it does not answer")
        if data := os.read(self.output, 65536):
            return data
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # until ssh has said why
        words = self.errors.read_text(errors="replace").split("\n")
        why = "; ".join(filter(None, map(str.strip, words))) or "the connection is closed"
        raise Lost(why, self.process.poll())

    def receive(self):
        """Yield the frames, (kind, data). Raises Lost."""
        unread, last = b"", time.monotonic() + LOGIN
        while MARK not in unread:
            unread += self.read(max(0, last - time.monotonic()))
        unread = unread.partition(MARK)[2]
        while True:
            while len(unread) < 5 or len(unread) < 5 + struct.unpack(">I", unread[1:5])[0]:
                unread += self.read(SILENCE)
            kind, end = unread[:1], 5 + struct.unpack(">I", unread[1:5])[0]
            data, unread = unread[5:end], unread[end:]
            if kind == b"!":
                raise Lost(data.decode(errors="replace"))
            if kind != b".":
                yield kind, data

    def close(self):
        self.must_stop.set()
        self.is_closed.set()
        self.process.stdin.close()
        self.process.stdout.close()


def ask(folder, number, machine, task):
    """Return what over_there.py answers to a task. Raises Lost."""
    connection = Connection(folder, number, machine, task, folder / "state" / f"errors{number}")
    try:
        return json.loads(next(connection.frames)[1])
    finally:
        connection.close()


def try_lock(path):
    """Return the open file, which is locked; None if another process has locked it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None


def take_gpus(state, number, machine, count, is_busy):
    """Return {GPU: lock} of count free GPUs of a machine, or None if fewer are free.

    is_busy tells for each GPU if any process uses it. Without GPUs a machine has a single place.
    """
    places = machine["maxTrialNumberPerGpu"] if count else 1
    allowed = machine["gpuIndices"] if machine["gpuIndices"] is not None else range(len(is_busy))
    taken = {}
    for gpu in [index for index in allowed if index < len(is_busy)] if count else [0]:
        locks = [try_lock(state / f"place{number}-{gpu}-{place}") for place in range(places)]
        free = [*filter(None, locks)]
        is_others = count and is_busy[gpu] and len(free) == places and not machine["useActiveGpu"]
        is_chosen = free and not is_others and len(taken) < max(count, 1)
        if is_chosen:
            taken[gpu] = free.pop()
        for lock in free:
            lock.close()
    if len(taken) == max(count, 1):
        return taken
    for lock in taken.values():
        lock.close()
    return None


class Trial:
    """A trial, from its wait for a machine to its end; folder is that of machines.json."""

    def __init__(self, folder):
        self.folder, self.own = folder, Path(os.environ["NNI_SYS_DIR"])
        self.state = folder / "state"  # files that all trials share
        self.search = json.loads((folder / "machines.json").read_text())
        self.note, self.connection = self.own / ".nni" / "elsewhere", None
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_):
        if not self.note.exists() or not self.note.read_text():
            os._exit(143)  # it still waits, and what has begun over there ends with this process
        self.connection.must_stop.set()

    def run(self):
        """Run the trial on the first free machine; return its exit status."""
        while True:
            # Lost machines come last.
            machines = enumerate(self.search["machines"])
            for number, machine in sorted(machines, key=lambda pair: self.marked("lost", pair[0])):
                with contextlib.ExitStack() as stack:
                    try:
                        if self.begin(number, machine, stack):
                            return self.follow()
                    except Lost as why:
                        self.lose(number, f"{name(machine)} is lost: {why}")
            time.sleep(0.1)

    def marked(self, kind, number):
        """Return since when a machine is "lost" or "busy", 0 if it is not."""
        with contextlib.suppress(OSError):
            return (self.state / f"{kind}{number}").stat().st_mtime
        return 0

    def lose(self, number, why):
        """Note that a machine is lost. If the trial has begun there, end this process."""
        is_new = not self.marked("lost", number)
        (self.state / f"lost{number}").touch()
        if self.note.read_text():
            self.note.write_text(f"lost {why}")
            os._exit(1)
        if is_new:
            self.say(f"{why}; it is left out until it answers")
        if is_new and all(self.marked("lost", n) for n in range(len(self.search["machines"]))):
            self.say("no machine is left: the trials wait until one is back")

    def say(self, line):
        with (self.folder.parent / "log" / "notices.log").open("a") as notices:
            notices.write(f"{' '.join(line.split())}\n")

    def begin(self, number, machine, stack):
        """Begin the trial on a machine if it is free; return whether it has begun. Raises Lost.

        stack closes what the trial needs until its end.
        """
        if any(time.time() - self.marked(kind, number) < REST for kind in ("lost", "busy")):
            return False
        turn = try_lock(self.state / f"turn{number}")  # one at a time sends code and takes GPUs
        if not turn:
            return False
        with turn:
            count = self.search["trialGpuNumber"] or 0
            gpu_count = self.state / f"gpus{number}"
            if gpu_count.exists() or not count:  # do not connect if other trials have all
                idle = [False] * int(gpu_count.read_text()) if count else []
                places = take_gpus(self.state, number, machine, count, idle)
                if places is None:
                    return False
                for lock in places.values():
                    lock.close()
            task = self.task(number)
            errors = self.own / ".nni" / "ssh"
            self.connection = Connection(self.folder, number, machine, task, errors)
            stack.callback(self.connection.close)
            state = json.loads(next(self.connection.frames)[1])
            if self.marked("lost", number):
                (self.state / f"lost{number}").unlink()
                self.say(f"{name(machine)} is back, and used again")
            gpu_count.write_text(str(len(state["gpus"])))
            places = take_gpus(self.state, number, machine, count, state["gpus"])
            if places is None:
                (self.state / f"busy{number}").touch()
                return False
            for lock in places.values():
                stack.callback(lock.close)
            code = None if state["hasCode"] else self.folder / "code.tar.gz"
            gpus = ",".join(map(str, places)) if count else "-1"
            gpus = "" if self.search["trialGpuNumber"] is None else gpus
            start = threading.Thread(target=self.connection.send_start, args=[code, gpus])
            start.daemon = True  # the machine may hang
            start.start()
            next(self.connection.frames)
            self.note.write_text(f"{time.time() * 1000:.0f} {machine['host']}\n")
            return True

    def task(self, number):
        return {
            "do": "run",
            "name": f"{self.search['id']}-{number}",
            "trial": os.environ["NNI_TRIAL_JOB_ID"],
            "command": self.search["command"],
            "code": self.search["code"],
            "needsGpus": bool(self.search["trialGpuNumber"]),
            "parameters": (self.own / "parameter.cfg").read_text(),
            "environment": {key: os.environ[key] for key in PASSED},
        }

    def follow(self):
        """Pass on what comes from the trial; return its exit status. Raises Lost."""
        with contextlib.ExitStack() as stack:
            reports = stack.enter_context((self.own / ".nni" / "metrics").open("ab"))
            sinks = {b"o": sys.stdout.buffer, b"e": sys.stderr.buffer, b"m": reports}
            for kind, data in self.connection.frames:
                if kind == b"x":
                    break
                if kind == b"f" and kind not in sinks:  # the trial's files
                    command = ["tar", "x", "-C", self.own, "--no-same-owner"]
                    tar = subprocess.Popen(command, stdin=subprocess.PIPE)
                    sinks[kind] = stack.enter_context(tar).stdin
                sinks[kind].write(data)
                sinks[kind].flush()
        status = int(data)
        return status if status >= 0 else 128 - status


def remove_all(folder):
    """Remove what the search has left on its machines, and close the connections to them."""
    search = json.loads((folder / "machines.json").read_text())

    def remove(number, machine):
        try:
            ask(folder, number, machine, {"do": "remove", "name": f"{search['id']}-{number}"})
        except Lost as why:
            left = f"~/.cache/nnisearch/{search['id']}-{number} stays there"
            print(f"{name(machine)} does not answer, so {left}: {why}")
        command, environment = ssh_command(folder, number, machine)
        close = [*command[:1], "-O", "exit", *command[1:]]
        subprocess.run(close, env=environment, stderr=subprocess.DEVNULL)

    threads = [threading.Thread(target=remove, args=m) for m in enumerate(search["machines"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main():
    folder = Path(sys.argv[1])
    status = remove_all(folder) if sys.argv[2:] else Trial(folder).run()
    sys.stdout.flush()
    os._exit(status or 0)  # a thread may still write to a machine that hangs


if __name__ == "__main__":
    main()
