"""The last step of every push: one commit that makes a repository hold exactly the result.

Large files are uploaded first, or lie on a branch of the same repository already; neither changes
what anybody sees. Then one commit names everything, removes stale weights, and fails if the branch
has moved since it was looked at; and what the Hub lists afterwards is compared, file by file, with
what was meant. A repository goes from one whole state to another. What is there already is neither
sent nor committed again, so that the same push, repeated after any interruption, goes on where it
was cut, and finds nothing to do where it was finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qconvert.errors import ContractViolation, HubError, printable
from qconvert.hub import client, failures
from qconvert.hub.commit import Commit, Outcome, commit, pull_with
from qconvert.hub.content import Content, LocalFile, missing
from qconvert.hub.stale import stale
from qconvert.hub.target import MAIN, Target, create
from qconvert.hub.tree import tree_of
from qconvert.hub.upload import Meter, additions, upload
from qconvert.naming import CARD_NAME
from qconvert.types import JSON, Progress
from qconvert.version import __version__


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is on the Hub now."""

    repo_id: str
    url: str
    """Of the repository, its branch, or the pull request."""
    commit: str
    pull_request: str | None
    private: bool
    sent: tuple[str, ...]
    """Files that the commit brought; those that were there already are not among them."""
    uploaded_bytes: int
    """Size of those that came from this disk."""
    deleted: tuple[str, ...]
    """Stale weights that the commit removed."""
    warnings: tuple[str, ...] = ()

    @property
    def already(self) -> bool:
        """Whether everything was there, so that nothing was committed."""
        return not self.sent and not self.deleted


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Files that lie on another revision of the same repository."""

    revision: str = MAIN
    contents: Mapping[str, Content] = field(default_factory=dict)


def previewed(to: Target) -> Target:
    """The same target with `replaces`, for a plan to show: asks the Hub for the whole tree."""
    if to.head is None:
        return to
    tree = tree_of(to.repo_id, to.head)
    card = (CARD_NAME,) if CARD_NAME in tree else ()
    return replace(to, replaces=(*stale(tree, ()), *card))


def publish(
    to: Target,
    files: Mapping[str, LocalFile],
    document: JSON | None,
    *,
    elsewhere: Elsewhere | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Makes the branch of `to` hold `files` and what lies `elsewhere`; `to` is made if need be.

    `document` is the manifest, for the words of the commit. Raises ContractViolation for a card
    that the Hub refuses or a file that changes meanwhile, RevisionMoved, PushIncomplete, and the
    errors of `client.call`.
    """
    elsewhere = elsewhere or Elsewhere()
    card = files.get(CARD_NAME)
    if card is not None and not to.exists:  # no repository is made for a card that is refused
        validate_card(to.repo_id, card.path.read_bytes())
    known, to = to.exists, _created(to)
    tree = tree_of(to.repo_id, to.head) if to.head else {}
    wanted = {name: file.content for name, file in files.items()} | dict(elsewhere.contents)
    outcome = Outcome(wanted, stale(tree, wanted))
    changed = missing(wanted, tree)
    if to.head and not changed and not outcome.gone:
        return pushed(to, Commit(to.head))
    if to.create_pr and (open_already := pull_with(to.repo_id, outcome)):
        return pushed(to, open_already)
    if card is not None and known and CARD_NAME in changed:
        validate_card(to.repo_id, card.path.read_bytes())
    new = {name: files[name] for name in changed if name in files}
    meter = Meter({name: file.content.size for name, file in new.items()}, progress)
    added = additions(new, meter)
    upload(to.repo_id, added, new, meter, revision=to.branch, create_pr=to.create_pr)
    copied = _copies([name for name in changed if name not in files], elsewhere.revision)
    made = commit(
        to.repo_id,
        [*added, *copied, *_deletions(outcome.gone)],
        outcome,
        message=f"Upload {to.repo_id.partition('/')[2]} by qconvert {__version__}",
        description=_description(document),
        parent=to.head,
        revision=to.branch,
        create_pr=to.create_pr,
    )
    return pushed(
        to,
        made,
        sent=changed,
        uploaded_bytes=sum(file.content.size for file in new.values()),
        deleted=outcome.gone,
    )


def _created(to: Target) -> Target:
    """`create`, with a warning if somebody moved the branch since `to` was looked at."""
    made = create(to)
    if to.head is None or made.head == to.head:
        return made
    moved = (
        f"{to.branch} of {to.repo_id} was moved by somebody else, from {to.head} to {made.head}: "
        "the result is on top of that"
    )
    return replace(made, warnings=(*made.warnings, moved))


def validate_card(repo_id: str, card: bytes) -> None:
    """Asks the Hub whether it takes a card; raises ContractViolation with its reasons if not."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    text = card.decode(errors="replace")

    def ask() -> None:
        response = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml",
            headers=client.request_headers(),
            json={"content": text, "repoType": "model"},
        )
        hf_raise_for_status(response)

    try:
        client.call(ask, repo_id, write=True)
    except HubError as error:
        if failures.status_of(error) != 400:
            raise
        raise ContractViolation(
            f"the Hub refuses the card's metadata: {printable(_complaints(error.__cause__))}",
            file=CARD_NAME,
        ) from error


def _complaints(cause: Any) -> str:
    try:
        found = cause.response.json()["errors"]
        return "; ".join(str(complaint["message"]) for complaint in found)
    except (ValueError, KeyError, TypeError):
        return failures.server_message(cause) or "it does not say why"


def _copies(names: Iterable[str], revision: str) -> list[Any]:
    from huggingface_hub import CommitOperationCopy

    return [CommitOperationCopy(name, name, src_revision=revision) for name in names]


def _deletions(names: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationDelete

    return [CommitOperationDelete(name, is_folder=False) for name in names]


def _description(document: JSON | None) -> str:
    """What the commit's text says of where the weights come from."""
    if document is None:
        return "Not made or proved by qconvert."
    source, validation = document.get("source") or {}, document.get("validation") or {}
    origin = f"{source.get('repo_id') or source.get('name')}"
    at = f" at {source['revision']}" if source.get("revision") else ""
    return printable(f"Made from {origin}{at}; {validation.get('verdict') or 'not validated'}.")


def pushed(
    to: Target,
    made: Commit,
    *,
    sent: Iterable[str] = (),
    uploaded_bytes: int = 0,
    deleted: Iterable[str] = (),
) -> Pushed:
    """What is to be said of a commit in `to`; of one that was there already, nothing was sent."""
    return Pushed(
        repo_id=to.repo_id,
        url=made.pull_request or to.page,
        commit=made.oid,
        pull_request=made.pull_request,
        private=to.private,
        sent=tuple(sent),
        uploaded_bytes=uploaded_bytes,
        deleted=tuple(deleted),
        warnings=to.warnings,
    )
