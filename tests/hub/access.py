"""Who may do what, and the errors for those who may not, in the Hub's words and codes."""

from __future__ import annotations

from tests.hub.storage import Commit, Repo
from tests.hub.wire import Exchange, Refused


def find(exchange: Exchange, groups: dict[str, str]) -> Repo:
    """The repository of a request; one that must not be seen is as good as missing."""
    hub = exchange.hub
    token = hub.who(exchange.request)
    repo = hub.repos.get(
        (groups["kind"].rstrip("s") if "kind" in groups else "model", groups["id"])
    )
    if repo and not repo.private:
        return repo
    if token is None:
        raise Refused(401, "Invalid username or password.", "RepoNotFound")
    if repo is None or not owns(exchange, repo.owner):
        raise Refused(404, "Repository not found", "RepoNotFound")
    return repo


def owns(exchange: Exchange, namespace: str) -> bool:
    token = exchange.hub.who(exchange.request)
    return token is not None and namespace in (token.user.name, *token.user.orgs)


def readable(exchange: Exchange, groups: dict[str, str]) -> Repo:
    """A repository whose files may be read: a gated one shows its tree to all, its files to few."""
    repo = find(exchange, groups)
    token = exchange.hub.who(exchange.request)
    if not repo.gated or owns(exchange, repo.owner):
        return repo
    if token is None:
        message = f"Access to model {repo.id} is restricted. You must have access to it and be "
        message += "authenticated to access it. Please log in."
        raise Refused(401, message, "GatedRepo")
    if token.user.name not in repo.granted:
        message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
        message += f" Visit {exchange.hub.endpoint}/{repo.id} to ask for access."
        raise Refused(403, message, "GatedRepo")
    return repo


def writable(exchange: Exchange, groups: dict[str, str]) -> Repo:
    """A repository the token may write to; for ?create_pr=1, reading it and a write token do."""
    repo = find(exchange, groups)
    token = exchange.hub.who(exchange.request)
    if token is None:
        raise Refused(401, "Invalid username or password.")
    if token.role != "write":
        raise Refused(403, "Forbidden: you must use a token with write permission")
    if not owns(exchange, repo.owner) and exchange.request.params.get("create_pr") != "1":
        raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a PR")
    return repo


def commit(repo: Repo, revision: str) -> Commit:
    try:
        return repo.at(revision)
    except KeyError:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None
