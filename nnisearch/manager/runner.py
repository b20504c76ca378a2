"""NNI's runner of trials, with its faults mended: pace.js sends this along, for `python3 -c`.

It starts in the runner's folder, on the machine that the trials are to run on.
"""

import asyncio
import hmac
import os
import pathlib
import runpy
import secrets
import shutil
import subprocess
import sys

import websockets

connect_to_anybody = websockets.connect


async def connect(url):
    """Connect to ws://HOST:PORT/SECRET, and stay only if the secret is known there (guard.js).

    Whoever has the port once the manager has ended could run any command here.
    """
    place, _, secret = url.rpartition("/")
    nonce = secrets.token_hex()

    def proof(who):
        return hmac.new(secret.encode(), f"{who} {nonce}".encode(), "sha256").hexdigest()

    client = await connect_to_anybody(f"{place}/{nonce}/{proof('runner')}")
    # Since version 13 of websockets the headers are those of a response.
    headers = client.response.headers if hasattr(client, "response") else client.response_headers
    if not hmac.compare_digest(headers.get("X-Proof", ""), proof("manager")):
        print(f"{place} is not the manager", file=sys.stderr, flush=True)
        os._exit(1)  # the runner's other threads go on for ever
    return client


class Popen(subprocess.Popen):
    """Starts a trial by a script: ps would show its command, where passwords may stand."""

    def __init__(self, command, *rest, shell=False, cwd=None, **how):
        if shell and cwd:
            script = pathlib.Path(cwd).resolve().with_name("run.sh")
            script.write_text(command, encoding="utf-8")
            command, shell = ["/bin/sh", str(script)], False
        super().__init__(command, *rest, shell=shell, cwd=cwd, **how)


# NNI's modules, which take these from here, cannot be imported before the runner has begun.
websockets.connect, subprocess.Popen = connect, Popen

# A runner that ends while it unpacks a trial's code leaves the folder half full, and the next one,
# which starts the trial anew after a resume, takes a folder that is there for a full one.
for folder in pathlib.Path("../../trials").glob("*"):
    if (folder / ".nni").exists() and not (folder / "trial_prepared").exists():
        shutil.rmtree(folder, ignore_errors=True)

# Since Python 3.14 asyncio makes no event loop by itself, and the runner finds none.
asyncio.set_event_loop(asyncio.new_event_loop())
runpy.run_module("nni.tools.trial_tool.trial_runner", run_name="__main__", alter_sys=True)
