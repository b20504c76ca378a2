"""NNI's runner of trials, with its faults mended: pace.js sends this along, for `python3 -c`.

It starts in the runner's folder, on the machine that the trials are to run on. It promises: a trial
ends when its command has ended; a runner that loses its manager ends its trials and itself, and
never looks for another manager.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import pathlib
import re
import runpy
import secrets
import select
import shutil
import subprocess
import sys
import threading
import time
import traceback
import types

import nni  # noqa: F401 - before the variables, by which it would take this for a trial
import psutil
import websockets

# The modules want them at their import; NNI's runner sets the right ones later.
NAMES = ("NNI_OUTPUT_DIR", "NNI_PLATFORM", "NNI_SYS_DIR", "NNI_EXP_ID", "NNI_TRIAL_JOB_ID")
os.environ.update(dict.fromkeys((*NAMES, "MULTI_PHASE"), "runner"))
from nni.tools.trial_tool import base_channel, log_utils, trial, web_channel  # noqa: E402

PAUSE = 0.05  # s; NNI looks for commands and for a trial's end every 0.5
# s: after 35 s of silence its manager is lost. The manager gives it up after 50 (machines.js).
PING, PATIENCE = 5, 30


class Channel(base_channel.BaseChannel):
    """The connection to the manager, in place of NNI's WebChannel."""

    client, unfinished = None, b""

    def _inner_open(self):
        runner = sys.modules["__main__"]
        runner.idle_timeout_seconds = float("inf")  # NNI gives a machine up that idles for 10 min
        runner.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, PAUSE)))
        # Since Python 3.14 asyncio makes no event loop by itself, and NNI's channel finds none.
        self.loop = asyncio.new_event_loop()
        try:
            self.client = self.loop.run_until_complete(self.connect())
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the threads that receive and send would keep the process

    async def connect(self):
        """Connect, and stay only if the manager knows the secret (guard.js).

        Whoever has the port once the manager has ended could run any command here.
        """
        port, _, secret = self.args.nnimanager_port.partition("/")
        nonce = secrets.token_hex()

        def proof(who):
            return hmac.new(secret.encode(), f"{who} {nonce}".encode(), "sha256").hexdigest()

        place = f"ws://{self.args.nnimanager_ip}:{port}"
        limits = {"ping_interval": PING, "ping_timeout": PATIENCE, "close_timeout": 1}
        client = await websockets.connect(f"{place}/{nonce}/{proof('runner')}", **limits)
        # Since version 13 of websockets the headers are those of a response.
        response = getattr(client, "response", None)
        headers = response.headers if response else client.response_headers
        if not hmac.compare_digest(headers.get("X-Proof", ""), proof("manager")):
            raise ConnectionError(f"{place} is not the manager")
        return client

    def _inner_send(self, message):
        # In the loop that receives: NNI sends in another one, which the connection does not allow.
        asyncio.run_coroutine_threadsafe(self.client.send(message), self.loop).result()

    def _inner_receive(self):
        if self.client is None:  # NNI starts to receive before it connects
            return []
        try:
            received = self.loop.run_until_complete(self.client.recv())
        except websockets.ConnectionClosed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    process.kill()
            os._exit(1)
        messages, self.unfinished = self._fetch_message(self.unfinished + received.encode())
        return messages

    def _inner_close(self):
        """Do nothing: the process ends next."""


class Reader(threading.Thread):
    """Hands on what a trial prints; NNI's waits for 6 to 11 s after the trial's end."""

    is_read_completed = False

    def __init__(self, logger, log_collection, log_level=logging.INFO):
        super().__init__(daemon=True)
        self.logger, self.level = logger, log_level
        # "none": only what the trial reports goes to the manager.
        self.pattern = re.compile(r"NNISDK_MEb'.*'$" if log_collection == "none" else r".*")
        self.output, self.input = os.pipe()
        self.has_ended = threading.Event()
        self.start()

    def fileno(self):
        return self.input

    def set_process_exit(self):
        self.has_ended.set()
        return True

    def run(self):
        unfinished = b""
        while True:
            is_last = self.has_ended.is_set()  # before the look: nothing comes after it
            if select.select([self.output], [], [], 0 if is_last else PAUSE)[0]:
                unfinished += os.read(self.output, 65536)
                *lines, unfinished = unfinished.replace(b"\r", b"\n").split(b"\n")
                self.hand_on(lines)
            elif is_last:
                break
        self.hand_on([unfinished] if unfinished else [])
        os.close(self.output)
        os.close(self.input)
        self.is_read_completed = True

    def hand_on(self, lines):
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            print(text, file=sys.__stdout__, flush=True)
            if found := self.pattern.search(text):
                self.logger.log(self.level, found[0])


class Popen(subprocess.Popen):
    """Starts a trial by a script: ps would show its command, where passwords may stand."""

    def __init__(self, command, *rest, shell=False, cwd=None, **how):
        if shell and cwd:
            script = pathlib.Path(cwd).resolve().with_name("run.sh")
            script.write_text(command, encoding="utf-8")
            command, shell = ["/bin/sh", str(script)], False
        super().__init__(command, *rest, shell=shell, cwd=cwd, **how)


class Whole(trial.Trial):
    """A trial whose folder is made anew if its code is only half unpacked there.

    A runner that ends meanwhile leaves it so, and the next one would take it for a full one.
    """

    def run(self):
        folder = pathlib.Path("../../trials", self.id)
        if not (folder / "trial_prepared").exists():
            shutil.rmtree(folder, ignore_errors=True)
        super().run()


base_channel.INTERVAL_SECONDS = PAUSE
log_utils.PipeLogReader = Reader
trial.Trial, trial.Popen = Whole, Popen
web_channel.WebChannel = Channel
runpy.run_module("nni.tools.trial_tool.trial_runner", run_name="__main__", alter_sys=True)
