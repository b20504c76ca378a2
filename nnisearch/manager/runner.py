"""Fixes and runs NNI's trial runner, on the machine of the trials.

pace.js sends this file to `python3 -c`, which starts in the runner's folder. A trial ends when its
command has ended. A runner that loses its manager ends its trials and itself, and never connects
to another manager.
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

import nni  # noqa: F401 - before the variables: with them nni behaves as in a trial
import psutil
import websockets

# The modules read these on import; NNI's runner sets the right values later.
NAMES = ("NNI_OUTPUT_DIR", "NNI_PLATFORM", "NNI_SYS_DIR", "NNI_EXP_ID", "NNI_TRIAL_JOB_ID")
os.environ.update(dict.fromkeys((*NAMES, "MULTI_PHASE"), "runner"))
from nni.tools.trial_tool import base_channel, log_utils, trial, web_channel  # noqa: E402

PAUSE = 0.05  # s between checks for commands and for a trial's end; NNI has 0.5
# s: the manager is lost after 35 s of silence. A runner is lost after 50 s (machines.js).
PING, PATIENCE = 5, 30


class Channel(base_channel.BaseChannel):
    """The connection to the manager, which replaces NNI's WebChannel."""

    client, unfinished = None, b""

    def _inner_open(self):
        runner = sys.modules["__main__"]
        runner.idle_timeout_seconds = float("inf")  # NNI's runner ends after 10 idle minutes
        runner.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, PAUSE)))
        # NNI expects an event loop, and asyncio creates none by itself since Python 3.14.
        self.loop = asyncio.new_event_loop()
        try:
            self.client = self.loop.run_until_complete(self.connect())
        except Exception:
            traceback.print_exc()
            os._exit(1)  # sys.exit() would wait for the threads that receive and send

    async def connect(self):
        """Connect, and stay only if the manager proves that it knows the secret (access.js).

        Otherwise another user could take the port after the manager's end, and run any command.
        """
        port, _, secret = self.args.nnimanager_port.partition("/")
        nonce = secrets.token_hex()

        def proof(who):
            return hmac.new(secret.encode(), f"{who} {nonce}".encode(), "sha256").hexdigest()

        place = f"ws://{self.args.nnimanager_ip}:{port}"
        limits = {"ping_interval": PING, "ping_timeout": PATIENCE, "close_timeout": 1}
        client = await websockets.connect(f"{place}/{nonce}/{proof('runner')}", **limits)
        # websockets has moved the headers into a response in version 13.
        response = getattr(client, "response", None)
        headers = response.headers if response else client.response_headers
        if not hmac.compare_digest(headers.get("X-Proof", ""), proof("manager")):
            raise ConnectionError(f"{place} is not the manager")
        return client

    def _inner_send(self, message):
        # In the receiving loop: the connection does not allow NNI's second loop.
        asyncio.run_coroutine_threadsafe(self.client.send(message), self.loop).result()

    def _inner_receive(self):
        if self.client is None:  # NNI receives before it connects
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
    """Passes a trial's output on. NNI's own reader waits 6 to 11 s after the trial's end."""

    is_read_completed = False

    def __init__(self, logger, log_collection, log_level=logging.INFO):
        super().__init__(daemon=True)
        self.logger, self.level = logger, log_level
        # "none": only the trial's reports go to the manager.
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
            is_last = self.has_ended.is_set()  # before select: after the end no output is added
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
    """Starts a trial by a script, because ps would show passwords in its command."""

    def __init__(self, command, *rest, shell=False, cwd=None, **how):
        if shell and cwd:
            script = pathlib.Path(cwd).resolve().with_name("run.sh")
            script.write_text(command, encoding="utf-8")
            command, shell = ["/bin/sh", str(script)], False
        super().__init__(command, *rest, shell=shell, cwd=cwd, **how)


class CleanTrial(trial.Trial):
    """A trial that first removes an incomplete folder.

    If a runner ends while it unpacks the code, the next one would take the folder as complete.
    """

    def run(self):
        folder = pathlib.Path("../../trials", self.id)
        if not (folder / "trial_prepared").exists():
            shutil.rmtree(folder, ignore_errors=True)
        super().run()


base_channel.INTERVAL_SECONDS = PAUSE
log_utils.PipeLogReader = Reader
trial.Trial, trial.Popen = CleanTrial, Popen
web_channel.WebChannel = Channel
runpy.run_module("nni.tools.trial_tool.trial_runner", run_name="__main__", alter_sys=True)
