"""NNI's runner of trials, with two faults mended: pace.js sends this along, for `python3 -c`.

It starts in the runner's folder, on the machine that the trials are to run on.
"""

import asyncio
import pathlib
import runpy
import shutil

# A runner that ends while it unpacks a trial's code leaves the folder half full, and the next one,
# which starts the trial anew after a resume, takes a folder that is there for a full one.
for trial in pathlib.Path("../../trials").glob("*"):
    if (trial / ".nni").exists() and not (trial / "trial_prepared").exists():
        shutil.rmtree(trial, ignore_errors=True)

# Since Python 3.14 asyncio makes no event loop by itself, and the runner finds none.
asyncio.set_event_loop(asyncio.new_event_loop())
runpy.run_module("nni.tools.trial_tool.trial_runner", run_name="__main__", alter_sys=True)
