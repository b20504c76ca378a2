"""A user's own tuners, advisor and assessors."""

import json
import os
import signal

from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.assessor import Assessor, AssessResult
from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.runtime.tuner_command_channel import CommandType
from nni.tuner import Tuner


class Constant(Tuner):
    """Proposes the same combination again and again, with the search space in it."""

    def update_search_space(self, search_space):
        self.space = search_space

    def generate_parameters(self, parameter_id, **_):
        return {"x": 7, "space": self.space}

    def receive_trial_result(self, *_, **__):
        pass


class Counter(MsgDispatcherBase):
    """An advisor that counts, and proposes the search space, too."""

    count = 0

    def __init__(self):
        super().__init__(os.environ["NNI_TUNER_COMMAND_CHANNEL"])

    def handle_initialize(self, data):
        self.space = data
        self.send(CommandType.Initialized, "")

    def handle_request_trial_jobs(self, data):
        for _ in range(data):
            parameters = {"x": self.count, "space": self.space}
            given = {"parameter_id": self.count, "parameters": parameters}
            self.count += 1
            self.send(CommandType.NewTrialJob, json.dumps(given))

    def handle_report_metric_data(self, data):
        pass

    def handle_trial_end(self, data):
        pass


class Mortal(GridSearchTuner):
    """Raises an exception at the second request, or is killed by the first result."""

    def __init__(self, is_killed):
        super().__init__()
        self.is_killed, self.results = is_killed, 0

    def generate_parameters(self, *args, **others):
        if self.results:
            raise KeyError("what is that?")
        return super().generate_parameters(*args, **others)

    def receive_trial_result(self, *_, **__):
        self.results += 1
        if self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)


class Patient(Assessor):
    """Ends no trial, and dies of a trial that reports text."""

    def __init__(self, patience):
        self.patience = patience

    def assess_trial(self, trial_job_id, trial_history):
        if isinstance(trial_history[-1], str):
            raise ValueError(trial_history[-1])
        return AssessResult.Good
