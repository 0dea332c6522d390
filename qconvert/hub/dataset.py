"""Files of dataset repositories: the public text that calibration draws from."""

from __future__ import annotations

from pathlib import Path

from qconvert.hub import client


def dataset_file(repo_id: str, commit: str, name: str) -> Path:
    """One file of a dataset repository at a commit, from the cache if it is there.

    Raises the errors of `client.call`; what the file holds is for the caller to check.
    """
    from huggingface_hub import hf_hub_download

    return Path(
        client.call(
            lambda: hf_hub_download(repo_id, name, repo_type="dataset", revision=commit),
            repo_id,
            commit,
        )
    )
