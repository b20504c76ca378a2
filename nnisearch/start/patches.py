"""Changes how NNI's Python code reads and writes its list of experiments, in every command."""

import contextlib
import json
from pathlib import Path

from nni.tools.nnictl import config_utils
from nni.tools.nnictl.config_utils import Experiments

from nnisearch.results.experiments import read_experiments
from nnisearch.shared.output import write
from nnisearch.start.locks import ListLock


def write_list(experiments):
    """Write NNI's list of experiments in one step. If that fails, the old list stays.

    NNI empties the file and then writes it: if NNI is killed in between, the list is lost.
    """
    with contextlib.suppress(OSError):
        content = json.dumps(experiments.experiments, indent=4)
        write(Path(experiments.experiment_file), content.encode(), mode=0o600)


Experiments.write_file = write_list
# NNI's own function runs code that the list names by __symbol__.
Experiments.read_file = lambda _: read_experiments()
config_utils.get_file_lock = lambda path, stale: ListLock(f"{path}.lock", stale)
