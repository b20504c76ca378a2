"""The half of over_ssh.py that runs on another machine. It needs Python 3.8 and /proc there.

ssh hands this text to `python3 -c`, and then frames: a letter, the data's length in 4 bytes, data.
It tries the machine, runs one trial, or removes the files of a search. If over_ssh.py ends, or is
silent for SILENCE seconds, this ends its trial, removes the trial's files, and ends.
"""

import contextlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

BEAT = 3  # s between two signs of life
SILENCE = 12  # s; fewer than in over_ssh.py, so that this trial ends before it runs again elsewhere
GRACE = 3  # s between SIGTERM and SIGKILL; NNI's manager waits 5 s, also for the trial's files
STAY = {".nni", "parameter.cfg", "run.sh"}  # of a trial's files; all others go home


class Channel:
    """The connection to over_ssh.py.

    When it breaks, the trial whose environment has the mark is ended, and its folder removed.
    """

    def __init__(self):
        self.lock, self.heard = threading.Lock(), time.monotonic()
        self.mark, self.folder = None, None
        for work in (self.beat, self.watch):
            threading.Thread(target=work, daemon=True).start()

    def send(self, kind, data=b""):
        with self.lock:
            sys.stdout.buffer.write(kind + struct.pack(">I", len(data)) + data)
            sys.stdout.buffer.flush()

    def receive(self):
        """Return the next frame, (kind, data)."""
        while True:
            header = sys.stdin.buffer.read(5)
            if len(header) < 5:
                self.abandon()
            data = sys.stdin.buffer.read(struct.unpack(">I", header[1:])[0])
            self.heard = time.monotonic()
            if header[:1] != b".":
                return header[:1], data

    def beat(self):
        with contextlib.suppress(OSError):  # the connection is closed, which receive() notices
            while True:
                self.send(b".")
                time.sleep(BEAT)

    def watch(self):
        while time.monotonic() - self.heard < SILENCE:
            time.sleep(0.5)
        self.abandon()

    def listen_for_stop(self):
        self.receive()
        end(self.mark)
        self.receive()  # until the connection closes

    def abandon(self):
        if self.mark:
            end(self.mark)
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


def processes(mark):
    """Return the PIDs of this user's processes with a variable that begins with mark."""
    pids = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            variables = b"\0" + (entry / "environ").read_bytes()
            if b"\0" + mark.encode() in variables:
                pids.append(int(entry.name))
    return pids


def end(mark):
    """End these processes by SIGTERM, and after GRACE seconds by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        pids = processes(mark)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        last = time.monotonic() + GRACE
        while processes(mark) and time.monotonic() < last:
            time.sleep(0.05)


def gpus():
    """Return for each GPU of this machine whether a process uses it."""
    try:
        said = subprocess.run(["nvidia-smi", "-q", "-x"], stdout=subprocess.PIPE, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    listed = re.findall(r"<gpu\b.*?</gpu>", said.decode(errors="replace"), re.DOTALL)
    return ["<process_info>" in gpu for gpu in listed]


def attempt(folder):
    """Return NNI's version and the number of GPUs here, or why NNI cannot be imported."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "try").write_text("x" * 100_000)  # fails on a full disk
    shutil.rmtree(folder)
    try:
        import nni

        return {"nni": nni.__version__, "gpus": len(gpus())}
    except BaseException as error:  # nni's import may raise anything
        return {"error": f"{type(error).__name__}: {error}"}


def receive_code(channel, folder):
    """Unpack the code that over_ssh.py sends; return the frame after it.

    The folder appears when it is whole.
    """
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700, parents=True)
    command = ["tar", "xz", "-C", str(unfinished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
        while (frame := channel.receive())[0] == b"c":
            with contextlib.suppress(BrokenPipeError):  # tar says why
                tar.stdin.write(frame[1])
        said = tar.communicate()[1]
    if tar.returncode:
        raise OSError(f"the code cannot be unpacked: {said.decode(errors='replace')}")
    unfinished.rename(folder)
    return frame


def run(channel, task, folder):
    """Run a trial, and send its output, reports, files and exit status."""
    code, own = folder / task["code"], folder / "trials" / task["trial"]
    mark = f"NNISEARCH_TRIAL={task['name']}/{task['trial']}/"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = {"gpus": gpus() if task["needsGpus"] else [], "hasCode": code.exists()}
    channel.send(b"h", json.dumps(state).encode())
    frame = channel.receive() if state["hasCode"] else receive_code(channel, code)
    visible = frame[1].decode()
    end(mark)  # if the process of an earlier connection was killed
    shutil.rmtree(own, ignore_errors=True)
    (own / ".nni").mkdir(mode=0o700, parents=True)
    (own / "parameter.cfg").write_text(task["parameters"])
    (own / "run.sh").write_text(task["command"])  # not an argument, which all users see
    names = {"NNI_SYS_DIR": str(own), "NNI_OUTPUT_DIR": str(own), "NNI_CODE_DIR": str(code)}
    names["NNISEARCH_TRIAL"] = mark.split("=")[1]
    names.update({"CUDA_VISIBLE_DEVICES": visible} if visible else {}, **task["environment"])
    with (own / ".nni" / "metrics").open("w+b") as metrics:
        channel.folder, channel.mark = own, mark
        process = subprocess.Popen(
            ["bash", str(own / "run.sh")],
            cwd=str(code),
            env={**os.environ, **names},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        channel.send(b"b")
        threading.Thread(target=channel.listen_for_stop, daemon=True).start()
        follow(channel, process, metrics)
    send_files(channel, own)
    shutil.rmtree(own, ignore_errors=True)
    channel.mark = None
    channel.send(b"x", str(process.returncode).encode())


def follow(channel, process, metrics):
    """Send a trial's output and reports until it has ended; end what it has left running."""
    streams = {process.stdout.fileno(): b"o", process.stderr.fileno(): b"e"}
    last = None
    while last is None or (streams and time.monotonic() < last):
        for stream in select.select([*streams], [], [], 0.05)[0]:
            data = os.read(stream, 65536)
            if data:
                channel.send(streams[stream], data)
            else:
                del streams[stream]
        if last is None and process.poll() is not None:
            end(channel.mark)
            last = time.monotonic() + 1  # another user's process may keep the streams open
        for data in iter(lambda: metrics.read(65536), b""):
            channel.send(b"m", data)
    process.wait()
    channel.send(b"m", metrics.read())


def send_files(channel, folder):
    names = [name for name in os.listdir(str(folder)) if name not in STAY]
    if not names:
        return
    command = ["tar", "c", "-C", str(folder), "--", *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
        for data in iter(lambda: tar.stdout.read(65536), b""):
            channel.send(b"f", data)


def main():
    sys.stdout.buffer.write(b"\n<nnisearch>")  # a login shell may have printed something before
    channel = Channel()
    task = json.loads(channel.receive()[1].decode())
    folder = pathlib.Path("~/.cache/nnisearch").expanduser() / task["name"]
    try:
        if task["do"] == "try":
            channel.send(b"r", json.dumps(attempt(folder)).encode())
        elif task["do"] == "remove":
            end(f"NNISEARCH_TRIAL={task['name']}/")
            shutil.rmtree(folder, ignore_errors=True)
            channel.send(b"r", b"{}")
        else:
            run(channel, task, folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            channel.send(b"!", str(error).encode())
        channel.abandon()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads still read
