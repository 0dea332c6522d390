"""A branch of the target where the shards of a conversion gather as they are finished.

A model that is larger than this disk is published without ever lying on it: each sealed shard is
one commit on the branch `qconvert-<fingerprint>`, together with a note of its size, its hash and
what was proved of its tensors, and once the Hub lists what was sent, the local copy may go. Nobody
loads from that branch. When all shards are there, one commit on the main branch takes them over
(the Hub copies LFS files by their hash, without moving a byte), and the branch is deleted.

The branch is also the journal of the run, and it outlives the machine: a rerun, from anywhere,
reads the notes and goes on after the last shard that is really there. The fingerprint in its name
says that source, options and versions are the same. A note is believed only if the Hub lists the
shard with that size and that hash. Every commit names its parent, so a second run at the same time
is noticed at its first shard; where several pour their shares of one conversion, as they are meant
to, each builds on what the others have committed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qconvert import manifest
from qconvert.errors import (
    ContractViolation,
    Forbidden,
    HubError,
    NotFound,
    PushIncomplete,
    RevisionMoved,
)
from qconvert.hub import client, repo, target
from qconvert.hub.commit import Commit, Outcome, commit
from qconvert.hub.content import (
    GIT_MOST,
    Content,
    LocalFile,
    difference,
    git_oid,
    look,
)
from qconvert.hub.publish import Elsewhere, Pushed, publish, pushed
from qconvert.hub.ranges import fetch_many
from qconvert.hub.stale import stale
from qconvert.hub.target import Target
from qconvert.hub.tree import tree_of
from qconvert.hub.upload import Meter, additions, upload
from qconvert.leftovers import Sealed
from qconvert.naming import CARD_NAME
from qconvert.staging import MANIFEST_NAME
from qconvert.tensors import identity
from qconvert.types import JSON, Plan, Progress, RemoteFile, Repository, Shard

_NOTES = ".qconvert"
_MOST_OF_NOTE = 64 << 20
_TURNS = 50
"""Commits of others that may come first."""
_TURN_SECONDS = 2.0


class BranchSink:
    """A `pour.Sink` on the Hub. The repository and the branch are made when this is."""

    def __init__(
        self,
        to: Target,
        plan: Plan,
        *,
        most_on_disk: int = 3,
        shared: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Finds out which shards are there already; raises HubErrors.

        `shared` if other processes commit other shards at the same time.
        """
        self.most_on_disk = most_on_disk
        self._shared = shared
        self.to = target.create(to)
        if to.create_pr:
            _check_branches_allowed(to.repo_id)
        self.branch = branch_name(plan.fingerprint)
        self.head = _branch_head(to.repo_id, self.branch)
        """The commit of the branch that holds all that was taken."""
        self._sizes = {shard.name: shard.size for shard in plan.shards}
        self._progress = progress
        self._contents: dict[str, Content] = {}
        self._done: dict[str, Sealed] = {}
        self._sent_bytes = 0
        self._read_notes()

    @property
    def repo_id(self) -> str:
        return self.to.repo_id

    @property
    def done(self) -> Mapping[str, Sealed]:
        return self._done

    def take(self, shard: Shard, path: Path, sealed: Sealed) -> None:
        """Commits a shard and its note to the branch; returns when the Hub lists both.

        Raises RevisionMoved if another run is at work there, PushIncomplete, HubErrors.
        """
        from huggingface_hub import CommitOperationAdd

        oid = git_oid(path.read_bytes()) if sealed.size <= GIT_MOST else None
        content = Content(sealed.size, sealed.sha256, oid)
        note = manifest.dump({**asdict(sealed), "oid": oid})
        file = LocalFile(path, content, identity(path.stat()))
        meter = Meter({shard.name: sealed.size}, self._progress)
        operations = [
            *additions({shard.name: file}, meter),
            CommitOperationAdd(_note_name(shard.name), note),
        ]
        upload(
            self.repo_id, operations, {shard.name: file}, meter,
            revision=self.branch, create_pr=False,
        )  # fmt: skip
        wanted = {shard.name: content, _note_name(shard.name): Content.of(note)}
        self._commit(operations, wanted, f"{shard.name}, on its way to the main branch")
        self._contents[shard.name] = content
        self._done[shard.name] = sealed
        self._sent_bytes += sealed.size

    def _commit(self, operations: Sequence[Any], wanted: Mapping[str, Content], what: str) -> None:
        """One commit on top of what the branch holds; of several at once each is let through."""
        tries = _TURNS if self._shared else 1
        while True:
            try:
                made = commit(
                    self.repo_id, operations, Outcome(wanted), message=what, parent=self.head,
                    revision=self.branch,
                )  # fmt: skip
            except RevisionMoved:
                tries -= 1
                if not tries:
                    raise
                time.sleep(random.uniform(0, _TURN_SECONDS))
                self.head = _branch_head(self.repo_id, self.branch)
            else:
                self.head = made.oid
                return

    def finish(self, files: Mapping[str, Path], expected: Mapping[str, str]) -> Pushed:
        """One commit that makes the target hold every shard and `files`; the branch is deleted.

        `expected` is the sha256 of every file but the manifest's own. Raises PushIncomplete for a
        shard that is not on the branch, ContractViolation for a file that is not as expected,
        RevisionMoved, HubErrors.
        """
        self._check_shards(expected)
        local = {name: look(path) for name, path in files.items()}
        for name, file in local.items():
            if expected.get(name, file.content.sha256) != file.content.sha256:
                raise ContractViolation(
                    "changed before it was pushed",
                    file=file.path,
                    expected=f"sha256 {expected[name]}",
                    got=file.content.sha256,
                )
        document = json.loads(files[MANIFEST_NAME].read_bytes())
        done = publish(
            self.to,
            local,
            document,
            elsewhere=Elsewhere(self.head, self._contents),
            progress=self._progress,
        )
        return replace(
            done,
            uploaded_bytes=done.uploaded_bytes + self._sent_bytes,
            warnings=(*done.warnings, *_delete(self.repo_id, self.branch)),
        )

    def discard(self) -> tuple[str, ...]:
        """Deletes the branch, of a plan that cannot succeed; what is left to say if that fails."""
        return _delete(self.repo_id, self.branch)

    def _read_notes(self) -> None:
        tree = tree_of(self.repo_id, self.head)
        names = [
            name
            for name in self._sizes
            if name in tree and (entry := tree.get(_note_name(name)))
            if entry.size <= _MOST_OF_NOTE
        ]
        repository = _repository(self.to, self.head, tree)
        spans = [(_note_name(name), 0, tree[_note_name(name)].size) for name in names]
        for name, note in zip(names, fetch_many(repository, spans), strict=True):
            if difference(Content.of(note), tree[_note_name(name)]):
                continue
            try:
                data = json.loads(note)
                content = Content(data["size"], data["sha256"], data["oid"])
                sealed = Sealed(content.size, content.sha256, dict(data["proofs"]))
            except (ValueError, KeyError, TypeError):
                continue
            if content.size == self._sizes[name] and not difference(content, tree[name]):
                self._contents[name], self._done[name] = content, sealed

    def _check_shards(self, expected: Mapping[str, str]) -> None:
        tree = tree_of(self.repo_id, self.head)
        for name in self._sizes:
            content = self._contents.get(name)
            differs = difference(content, tree.get(name)) if content else ("a shard", "none")
            if content and not differs and content.sha256 != expected.get(name):
                differs = f"sha256 {expected.get(name)}", content.sha256
            if differs:
                raise PushIncomplete(
                    f"the branch {self.branch} does not hold what is to be published",
                    file=f"{self.repo_id}/{name}",
                    expected=differs[0],
                    got=differs[1],
                    hint="the same command: it makes what is missing",
                )


def finished(to: Target, plan: Plan) -> tuple[Pushed, JSON] | None:
    """What an earlier run of the same plan has published, and its manifest; None if none has.

    A branch that such a run left, killed before it could delete it, is deleted.
    """
    if not to.exists or to.head is None or to.create_pr:
        return None
    tree = tree_of(to.repo_id, to.head)
    if MANIFEST_NAME not in tree or tree[MANIFEST_NAME].size > _MOST_OF_NOTE:
        return None
    repository = _repository(to, to.head, tree)
    (data,) = fetch_many(repository, [(MANIFEST_NAME, 0, tree[MANIFEST_NAME].size)])
    try:
        document: JSON = json.loads(data)
        promised = dict(document["files"])
        same = document["fingerprint"] == plan.fingerprint
    except (ValueError, KeyError, TypeError):
        return None
    if not same or not promised.keys() <= tree.keys() or stale(tree, promised):
        return None
    if not _as_promised(repository, promised):
        return None
    left = _delete(to.repo_id, branch_name(plan.fingerprint))
    return replace(pushed(to, Commit(to.head)), warnings=(*to.warnings, *left)), document


def branch_name(fingerprint: str) -> str:
    """Where the shards of a plan gather."""
    return f"qconvert-{fingerprint[:16]}"


def _as_promised(repository: Repository, promised: Mapping[str, str]) -> bool:
    """Whether the files are what a manifest says, the card aside, which people edit.

    Of files in git, the Hub tells no sha256.
    """
    files = repository.files
    names = promised.keys() - {CARD_NAME}
    in_git = [name for name in names if files[name].sha256 is None]
    if any(files[name].sha256 != promised[name] for name in names - set(in_git)):
        return False
    spans = [(name, 0, files[name].size) for name in in_git]
    found = fetch_many(repository, spans)
    return all(
        Content.of(data).sha256 == promised[name] for name, data in zip(in_git, found, strict=True)
    )


def _note_name(shard: str) -> str:
    return f"{_NOTES}/{shard}.json"


def _branch_head(repo_id: str, branch: str) -> str:
    head = repo.head_of(repo_id, branch) or repo.make_branch(repo_id, branch)
    if head is None:
        raise NotFound(f"no branch {branch} in {repo_id}, though it has just been made")
    return head


def _check_branches_allowed(repo_id: str) -> None:
    """A pull request takes no right to write, but the branch of the shards does."""
    try:
        repo.check_write(repo_id)
    except Forbidden as error:
        error.hint = "--output DIR: a pull request is then made from there"
        raise


def _repository(to: Target, commit: str, tree: Mapping[str, RemoteFile]) -> Repository:
    return Repository(
        to.repo_id, commit, asked=to.repo_id, private=to.private, gated=False, files=tree
    )


def _delete(repo_id: str, branch: str) -> tuple[str, ...]:
    """Deletes a branch that has served; what is left to say if that fails."""
    from huggingface_hub import HfApi

    try:
        client.call(lambda: HfApi().delete_branch(repo_id, branch=branch), repo_id, write=True)
    except NotFound:
        return ()
    except HubError as error:
        return (f"the branch {branch} of {repo_id} could not be deleted: {error}",)
    return ()
