"""Programs as processes that need not import torch: forks of a process that has imported it.

Their synthetic data set is the one of few_images.py.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from pathlib import Path

import few_images
import pytest

from trial import data

SUPPORT = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")


class Program:
    """A running program; stdout and stderr are what it has printed so far."""

    def __init__(self, path, argv, folder, environment, stderr=None):
        self.files = [folder / "stdout", stderr or folder / "stderr"]
        arguments = (str(path), [str(each) for each in argv], folder, environment, self.files)
        self.process = CONTEXT.Process(target=run, args=arguments)
        with pytest.MonkeyPatch.context() as patch:  # for the process that is forked, at its start
            patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
            CONTEXT.set_forkserver_preload(["train", "tiny_cifar10"])
            forkserver.ensure_running()
        self.process.start()

    @property
    def stdout(self):
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def stderr(self):
        return self.files[1].read_text() if self.files[1].exists() else ""

    def wait(self):
        """Wait for the end and return the exit status."""
        self.process.join(300)
        assert self.process.exitcode is not None
        return self.process.exitcode


def run(path, argv, folder, environment, files):
    """Run the program at path in this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    sys.argv[:] = [path, *argv]
    data.make_synthetic = few_images.make
    runpy.run_path(path, run_name="__main__")
