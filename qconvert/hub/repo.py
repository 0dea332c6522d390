"""A repository of the Hub, asked and made: one call each, and what it means where it fails."""

from __future__ import annotations

from typing import Any

from qconvert.errors import Forbidden, NotFound, UsageError, printable
from qconvert.hub import client
from qconvert.types import JSON

MAIN = "main"
_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{printable(repo_id)} is no name for a repository: "
            + printable(str(error).partition(":")[0])
        ) from None


def whoami(repo_id: str) -> JSON:
    """Who the token belongs to. The Hub counts these requests closely: one for each push."""
    from huggingface_hub import HfApi

    you: JSON = client.call(lambda: HfApi().whoami(), repo_id, write=True)
    return you


def info_of(repo_id: str) -> Any:
    """What the Hub says of a repository; None where there is none, or none that may be seen."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return client.call(lambda: HfApi().model_info(repo_id), repo_id)
    except NotFound as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return None
        raise


def make_branch(repo_id: str, name: str) -> str | None:
    """Makes a branch where the main one is, unless it is there; its commit."""
    from huggingface_hub import HfApi

    client.call(
        lambda: HfApi().create_branch(repo_id, branch=name, exist_ok=True), repo_id, write=True
    )
    return head_of(repo_id, name)


def check_write(repo_id: str) -> None:
    """Raises Forbidden unless the token may write to a repository that is there."""
    from huggingface_hub import HfApi

    try:
        client.call(lambda: HfApi().auth_check(repo_id, write=True), repo_id, write=True)
    except Forbidden as error:
        error.hint = f"--create-pr, or {error.hint}"
        raise


def head_of(repo_id: str, revision: str = MAIN) -> str | None:
    """The commit of a branch; None where there is no such branch, or no commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = client.call(
            lambda: HfApi().model_info(repo_id, revision=revision), repo_id, revision
        )
    except NotFound as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            return None
        raise
    return info.sha


def first_commit(repo_id: str) -> str:
    """Makes the commit that a repository of the Hub begins with, where there is none."""
    from huggingface_hub import CommitOperationAdd, HfApi

    add = CommitOperationAdd(".gitattributes", _GITATTRIBUTES)
    made = client.call(
        lambda: HfApi().create_commit(repo_id, [add], commit_message="initial commit"),
        repo_id,
        write=True,
    )
    return made.oid
