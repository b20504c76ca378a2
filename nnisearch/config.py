"""An NNI configuration, loaded as nnictl loads it."""

import contextlib
import re
import traceback

from nni.experiment.config import ExperimentConfig, utils

from nnisearch.text import one_line

PLATFORMS = "local, remote, openpai, aml, dlc, kubeflow, frameworkcontroller, adl"


def load(path):
    """Return the configuration in the file, an ExperimentConfig in NNI's canonical form."""
    try:
        config = ExperimentConfig.load(path)
        if isinstance(config.training_service, dict):  # of a platform that NNI does not know
            platform = config.training_service.get("platform")
            raise ValueError(f"trainingService.platform is {platform!r}; allowed: {PLATFORMS}")
        return config.canonical_copy()
    except AssertionError as error:  # NNI's have no text: the line that failed is the text
        frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
        rule = traceback.extract_tb(error.__traceback__)[-1].line.removeprefix("assert self.")
        key = re.match(r"\w*", rule)[0]
        value = getattr(frame.f_locals.get("self"), key, "not that")
        raise ValueError(f"{path}: {key} is {value!r}; allowed: {rule}") from None
    except Exception as error:  # of the file, YAML and NNI's classes
        raise ValueError(f"{path}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(Exception):  # ExperimentConfig.load() leaves it set if it fails
            utils.unset_base_path()


def is_local(config):
    """Return whether the trials run on this machine."""
    return getattr(config.training_service, "platform", "several") == "local"
