"""Searches whose trials run on other machines: over SSH (platform remote), or as SLURM jobs.

For NNI such a search is a local one. The trial's process here waits for the one over there;
manager/elsewhere.js tells NNI's manager what happens to it.
"""

from pathlib import Path

from nnisearch.elsewhere import machines, slurm


def prepare(config, id: str, folder: Path, is_resumed: bool) -> dict | None:
    """Prepare a search's start, and return elsewhere.js's settings; None if trials run here.

    folder is the experiment's. A configuration of platform remote becomes a local one. Raises
    ValueError for what cannot work.
    """
    if machines.is_used(config, folder if is_resumed else None):
        return machines.prepare(config, id, folder / "elsewhere")
    slurm.warn(config)
    if slurm.is_used(config):
        return slurm.prepare(config, id, folder)
    return None
