"""One commit: made once, known again when its answer is lost, compared with what was meant.

The library posts a commit a single time, or, in its uploader of folders, again and again until an
answer comes, which makes the same commit twice. Here the commit names the parent that it was made
for, so that a second one cannot be; and after any failure the Hub is asked whether the branch now
holds what was to be there. If so, the commit was made, by whom does not matter. If the branch is
somewhere else, somebody moved it, and nothing is forced. If it is where it was, the commit is
posted again, a bounded number of times.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qconvert.errors import HubError, Network, PushIncomplete, RevisionMoved
from qconvert.hub import client, failures
from qconvert.hub.content import Content, difference, missing
from qconvert.hub.target import head_of
from qconvert.hub.tree import tree_of
from qconvert.hub.upload import plain_errors
from qconvert.types import RemoteFile

_RETRIES = 4
_NOT_DONE = (408, 429, 503)
"""Statuses that say that a request was not looked at."""
_MOST_PULLS = 5
"""Pull requests that are looked into for what was to be pushed, the newest first."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that is there and holds what it should."""

    oid: str
    pull_request: str | None = None
    """Its URL."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a revision is to hold after a commit, and what no longer."""

    wanted: Mapping[str, Content]
    gone: Collection[str] = ()

    def reached(self, tree: Mapping[str, RemoteFile]) -> bool:
        return not missing(self.wanted, tree) and not any(name in tree for name in self.gone)


def commit(
    repo_id: str,
    operations: Sequence[Any],
    outcome: Outcome,
    *,
    message: str,
    parent: str | None,
    revision: str,
    create_pr: bool = False,
    description: str = "",
) -> Commit:
    """Posts one commit on top of `parent` and compares what it made with what was wanted.

    Raises RevisionMoved if the branch is no longer at `parent`, PushIncomplete if the remote tree
    differs from `outcome`, and the errors of `client.call`.
    """
    from huggingface_hub import HfApi

    def post() -> Any:
        with plain_errors(repo_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the card, which was validated before
            return HfApi().create_commit(
                repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )

    backoff = client.Backoff(_RETRIES)
    while True:
        try:
            info = client.call(post, repo_id, revision, write=True, retries=0)
            made = Commit(info.oid, info.pr_url)
            break
        except (Network, RevisionMoved) as error:
            if create_pr:
                found = _pull_after(repo_id, outcome, error)
            else:
                found = _landed(repo_id, revision, parent, outcome, error)
            if found is not None:
                made = found
                break
            cause = error.__cause__
            headers = failures.headers_of(cause) if isinstance(cause, Exception) else {}
            if not backoff.wait(headers):
                raise
    _check(repo_id, made.oid, outcome)
    return made


def _check(repo_id: str, revision: str, outcome: Outcome) -> None:
    """Raises PushIncomplete unless a revision holds what it should."""
    tree = tree_of(repo_id, revision)
    for name, content in outcome.wanted.items():
        if differs := difference(content, tree.get(name)):
            raise PushIncomplete(
                "the Hub does not hold what was sent",
                file=f"{repo_id}/{name}",
                expected=differs[0],
                got=differs[1],
                hint="the same command: it sends what differs",
            )
    for name in outcome.gone:
        if name in tree:
            raise PushIncomplete(
                "a file that was to be deleted is still on the Hub", file=f"{repo_id}/{name}"
            )


def _landed(
    repo_id: str, revision: str, parent: str | None, outcome: Outcome, error: HubError
) -> Commit | None:
    """The commit of which no answer came, if it was made; None if the branch has not moved."""
    head = head_of(repo_id, revision)
    if head == parent or head is None:
        return None
    if outcome.reached(tree_of(repo_id, head)):
        return Commit(head)
    raise RevisionMoved(
        f"{revision} of {repo_id} was moved by somebody else, from {parent} to {head}",
        hint="the same command, which builds on that commit",
    ) from error


def pull_with(repo_id: str, outcome: Outcome) -> Commit | None:
    """The newest open pull request that holds what is to be pushed."""
    from huggingface_hub import HfApi

    refs = client.call(lambda: HfApi().list_repo_refs(repo_id, include_pull_requests=True), repo_id)
    pulls = sorted(
        (int(ref.name.rpartition("/")[2]), ref.target_commit) for ref in refs.pull_requests or []
    )
    for number, oid in reversed(pulls[-_MOST_PULLS:]):
        if not outcome.reached(tree_of(repo_id, oid)):
            continue
        details = client.call(partial(HfApi().get_discussion_details, repo_id, number), repo_id)
        if details.status in ("open", "draft"):
            return Commit(oid, details.url)
    return None


def _pull_after(repo_id: str, outcome: Outcome, error: HubError) -> Commit | None:
    """The pull request of which no answer came; raises `error` where there may yet be one.

    No parent keeps a pull request from being opened twice.
    """
    if failures.status_of(error) in _NOT_DONE:
        return None
    backoff = client.Backoff(2)
    while True:
        if found := pull_with(repo_id, outcome):
            return found
        if not backoff.wait({}):
            raise error
