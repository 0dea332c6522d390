"""Where a result is to go on the Hub, found out before anything is converted or created.

Three questions are answered from the Hub's own words: whose namespace it is, whether the repository
is there and who sees it, and whether this token may write to it. `create_repo(exist_ok=True)`
answers none of them (it succeeds for whoever can read), so the write check is made by itself.

What was made of a model that not everybody may see is not shown to everybody by default: a new
repository is private unless its source is known to be open, and nothing goes into a public one
from a private or gated source without `--public`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qconvert.errors import Forbidden, NotFound, UsageError, printable
from qconvert.hub import client, repo
from qconvert.hub.repo import MAIN
from qconvert.naming import COMMIT
from qconvert.types import Repository


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a user says of where a result is to go."""

    repo_id: str | None = None
    """`<you>/<default name>` unless it is given; a name without an owner is yours."""
    private: bool | None = None
    """None: as the source is."""
    revision: str | None = None
    """Branch to commit to; made where it is missing. None is the main branch."""
    create_pr: bool = False
    """Open a pull request instead; read access is enough for that."""
    unverified: bool = False
    """Push what was not proved, too."""


@dataclass(frozen=True, slots=True)
class Target:
    """A repository that may be written to, and the commit that a push will build on."""

    repo_id: str
    """As the Hub spells it."""
    exists: bool
    private: bool
    """Who sees it once it is there."""
    revision: str | None = None
    """The branch to commit to; None is the main one."""
    create_pr: bool = False
    head: str | None = None
    """Commit of `revision`; None where there is none yet."""
    replaces: tuple[str, ...] = ()
    """Weights, and a card, that a push would delete or replace there (see `publish.previewed`)."""
    warnings: tuple[str, ...] = ()

    @property
    def branch(self) -> str:
        return self.revision or MAIN

    @property
    def page(self) -> str:
        """The URL of the repository, or of its branch."""
        from huggingface_hub import constants

        page = f"{constants.ENDPOINT}/{self.repo_id}"
        return page if self.branch == MAIN else f"{page}/tree/{self.branch}"


def find(options: PushOptions, default_name: str, source: Repository | None) -> Target:
    """The target of a push of what is made from `source`; asks the Hub, creates nothing.

    `source` is None where it is not known to be on the Hub. Raises NotLoggedIn, Forbidden,
    UsageError for options that cannot be followed, NotFound, Network.
    """
    _refuse_impossible(options, source)
    you = repo.whoami(options.repo_id or default_name)
    repo_id = options.repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{you['name']}/{repo_id}"
    repo.check_id(repo_id)
    info = repo.info_of(repo_id)
    if info is None:
        if options.create_pr:
            raise NotFound(
                f"no repository {repo_id} on the Hub to open a pull request in",
                hint="leave --create-pr out",
            )
        _check_namespace(you, repo_id)
        known_open = source is not None and source.private is False and source.gated is False
        private = options.private if options.private is not None else not known_open
        target = Target(repo_id, exists=False, private=private, revision=options.revision)
    else:
        _refuse_source(info.id, options, source)
        target = _existing(info, options, you, source)
    return replace(target, warnings=_warnings(target, options, source))


def create(target: Target) -> Target:
    """The same target when it is there to be written to; its branch and first commit too.

    Raises Forbidden, NotLoggedIn, Network, and UsageError if a repository that was to be private
    turns out to be public.
    """
    from huggingface_hub import HfApi

    repo_id, api = target.repo_id, HfApi()
    if not target.exists:
        client.call(
            lambda: api.create_repo(repo_id, private=target.private, exist_ok=True),
            repo_id,
            write=True,
        )
    if not target.create_pr:
        repo.check_write(repo_id)
    info = repo.info_of(repo_id)
    if info is None:
        raise NotFound(f"no repository {repo_id} on the Hub, though it has just been created")
    if target.private and not info.private:
        raise _public(repo_id)
    made = replace(target, exists=True, private=bool(info.private))
    main = info.sha or repo.first_commit(repo_id)
    if target.branch == MAIN:
        return replace(made, head=main)
    return replace(
        made, head=repo.head_of(repo_id, target.branch) or repo.make_branch(repo_id, target.branch)
    )


def _refuse_impossible(options: PushOptions, source: Repository | None) -> None:
    if options.repo_id is not None and not options.repo_id.strip():
        raise UsageError("no repository named to push to", hint="--repo-id ORG/NAME")
    _refuse_source(options.repo_id or "", options, source)
    if options.revision is not None and COMMIT.fullmatch(options.revision):
        raise UsageError(
            f"--push-revision {options.revision} is a commit: a push goes to a branch",
            hint="--push-revision main",
        )
    if options.create_pr and options.revision is not None:
        raise UsageError(
            "--create-pr opens a pull request on the main branch: it takes no --push-revision"
        )


def _refuse_source(repo_id: str, options: PushOptions, source: Repository | None) -> None:
    """Raises UsageError where the result would take the place of what it was made from."""
    on_main = options.revision in (None, MAIN) and not options.create_pr
    if source is not None and on_main and repo_id.lower() == source.id.lower():
        raise UsageError(
            f"{printable(source.id)} is the source: its weights would be replaced by the result",
            hint="--repo-id ORG/NAME, or another branch of it with --push-revision BRANCH",
        )


def _existing(
    info: Any, options: PushOptions, you: Mapping[str, Any], source: Repository | None
) -> Target:
    closed = source is not None and _is_closed(source)
    if not info.private and (options.private or (closed and options.private is None)):
        raise _public(info.id, because=source if not options.private else None)
    if options.create_pr:
        if _role(you) == "read":
            raise _read_only(info.id)
    else:
        repo.check_write(info.id)
    head = info.sha
    if options.revision is not None and options.revision != MAIN:
        head = repo.head_of(info.id, options.revision)
    return Target(
        info.id,
        exists=True,
        private=bool(info.private),
        revision=options.revision,
        create_pr=options.create_pr,
        head=head,
    )


def _is_closed(source: Repository) -> bool:
    """Whether it is known that not everybody may read it."""
    return bool(source.private or source.gated)


def _check_namespace(you: Mapping[str, Any], repo_id: str) -> None:
    """Raises Forbidden where it is certain that this token may not create a repository there."""
    owner = repo_id.partition("/")[0]
    if _role(you) == "read":
        raise _read_only(repo_id)
    orgs = {org.get("name"): org.get("roleInOrg") for org in you.get("orgs") or []}
    if owner != you.get("name") and (owner not in orgs or orgs[owner] == "read"):
        raise Forbidden(
            f"{you.get('name')} may not create a repository of {printable(owner)}",
            hint=f"--repo-id {you.get('name')}/{repo_id.partition('/')[2]}",
        )


def _role(you: Mapping[str, Any]) -> str | None:
    """ "read", "write", "fineGrained", or None where the Hub does not say."""
    token = (you.get("auth") or {}).get("accessToken") or {}
    role: str | None = token.get("role")
    return role


def _read_only(repo_id: str) -> Forbidden:
    from huggingface_hub import constants

    return Forbidden(
        f"the token may only read: it cannot write to {repo_id}",
        hint=f"make one that may write at {constants.ENDPOINT}/settings/tokens, and run: "
        "hf auth login --force",
    )


def _public(repo_id: str, because: Repository | None = None) -> UsageError:
    if because is None:
        return UsageError(
            f"{repo_id} is public: what goes there is not private",
            hint=f"hf repos settings {repo_id} --private",
        )
    kind = "gated" if because.gated else "private"
    return UsageError(
        f"{because.id} is {kind}, and {repo_id} is public: everybody could read the result",
        hint="--public",
    )


def _warnings(target: Target, options: PushOptions, source: Repository | None) -> tuple[str, ...]:
    found = []
    if source is not None and _is_closed(source) and not target.private:
        kind = "gated" if source.gated else "private"
        found.append(f"{source.id} is {kind}; the result in {target.repo_id} will be public")
    if options.private is False and target.private:
        found.append(f"{target.repo_id} is private and stays so: its settings are on its page")
    return tuple(found)
