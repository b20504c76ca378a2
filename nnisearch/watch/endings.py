"""Texts on how trials end."""

import re

from nni.experiment.config.utils import parse_time

from nnisearch.results.trials import NO_RESULT
from nnisearch.shared.text import one_line, reason, tail


class Endings:
    """Texts on how trials end. A reason is given once, however many trials have it."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.told = set()

    def news(self, trial):
        """Return the reason for what is odd about an ended trial, "" if it was given before."""
        words = self.reason(trial)
        is_new = words not in self.told
        self.told.add(words)
        return words if is_new else ""

    def reason(self, trial):
        """Return why an ended trial has no result, "" if it has one."""
        if trial.has_result or trial.status in ("USER_CANCELED", "SYS_CANCELED"):
            return ""
        if trial.status == "FAILED":
            return f"has FAILED: {self.failure(trial)}"
        if trial.reported is not None:
            return f"reported {one_line(trial.reported)}, {NO_RESULT}"
        if trial.status == "SUCCEEDED":
            return "has ended without reporting a result"
        return f"was {self.short(trial)}"

    def short(self, trial):
        """Return an ended trial's result, or how it has ended without one."""
        if trial.has_result:
            return f"{trial.result:g}"
        if trial.status == "SUCCEEDED":
            reported = trial.reported
            return "without a result" + (f": it reported {one_line(reported)}" if reported else "")
        if trial.status == "EARLY_STOPPED":
            limit = self.config.max_trial_duration
            if limit is not None and (trial.seconds or 0) >= parse_time(limit):
                return f"ended by maxTrialDuration ({limit})"
            return f"ended by {'the assessor' if self.config.assessor else 'the tuner'}"
        if trial.status == "FAILED" and (status := self.exit_status(trial)):
            return f"FAILED with exit status {status}"
        return one_line(trial.status)

    def failure(self, trial):
        """Return why a trial has failed, by its stderr and its exit status."""
        try:
            words = one_line(reason(tail(self.folder / "trials" / trial.id / "stderr")))
        except OSError:
            return "its files are not on this machine"
        status = self.exit_status(trial)
        words += f" (exit status {status})" if status else " (no exit status: was it killed?)"
        if trial.result is not None:
            words += f"; so its result, {trial.result:g}, does not count"
        return words

    def exit_status(self, trial):
        """Return the exit status of a trial on this machine, or None if it was not noted."""
        try:
            noted = (self.folder / "trials" / trial.id / ".nni" / "state").read_text()
        except (OSError, ValueError):
            return None
        status = re.match(r"\s*(\d+)\s", noted)
        return int(status[1]) if status else None
