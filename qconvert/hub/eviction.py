"""Sources that were fetched for a batch, and go again when no job of it needs them any more.

Only what was fetched for that purpose is removed. A marker in the cache's folder of the repository
says so; it is put there before the first byte of a weight arrives, so that a batch that was killed
knows, when it is run again, what is its own.
"""

from __future__ import annotations

from pathlib import Path

from qconvert.hub import snapshot

_MARKER = ".qconvert-evictable-"


def claim(repo_id: str, commit: str) -> None:
    """Marks a commit as fetched for a batch. To be called while none of its weights is here."""
    marker = _marker(repo_id, commit)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def claimed(repo_id: str, commit: str) -> bool:
    """Whether `evict` may remove that commit."""
    return _marker(repo_id, commit).exists()


def evict(repo_id: str, commit: str) -> int:
    """Removes a commit that was fetched for a batch; returns the bytes that are free again.

    What other commits of the repository share with it stays.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if not claimed(repo_id, commit):
        return 0
    try:
        strategy = scan_cache_dir(_marker(repo_id, commit).parents[1]).delete_revisions(commit)
    except CacheNotFound:
        return 0
    strategy.execute()
    _marker(repo_id, commit).unlink(missing_ok=True)  # last: a cut in between is made good
    return int(strategy.expected_freed_size)


def _marker(repo_id: str, commit: str) -> Path:
    return snapshot.folder(repo_id) / f"{_MARKER}{commit}"
