"""Routes that make and change repositories: create, delete, settings, branches, pull requests."""

from __future__ import annotations

import re

from tests.hub.access import commit, owns, readable, writable
from tests.hub.api import REPO, stamp
from tests.hub.storage import Repo
from tests.hub.wire import Answer, Exchange, Refused, Routes, reply

API = Routes()
Groups = dict[str, str]


@API.on("POST", "/api/repos/create")
def create(exchange: Exchange, _: Groups) -> Answer:
    hub, asked = exchange.hub, exchange.json()
    token = hub.who(exchange.request)
    if token is None:
        raise Refused(401, "Invalid username or password.")
    owner = asked.get("organization") or token.user.name
    kind, name = asked.get("type", "model"), asked["name"]
    repo_id = f"{owner}/{name}"
    if not owns(exchange, owner) or token.role != "write":
        raise Refused(
            403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
        )
    if not re.fullmatch(r"[\w.-]{1,96}", name):
        raise Refused(400, f"Invalid repo name: {name}")
    url = f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if any((k, i.lower()) == (kind, repo_id.lower()) for k, i in hub.repos):
        return reply({"error": f"You already created this {kind} repo", "url": url}, 409)
    private = asked.get("visibility") == "private" or asked.get("private") is True
    repo = hub.add_repo(repo_id, kind=kind, private=private)
    return reply({"url": url, "name": repo.id, "id": repo.commits[0].oid[:24]})


@API.on("DELETE", "/api/repos/delete")
def delete(exchange: Exchange, _: Groups) -> Answer:
    asked = exchange.json()
    token = exchange.hub.who(exchange.request)
    owner = asked.get("organization") or (token.user.name if token else "")
    kind = asked.get("type") or "model"
    repo = writable(exchange, {"kind": kind, "id": f"{owner}/{asked['name']}"})
    del exchange.hub.repos[kind, repo.id]
    return reply({})


@API.on("PUT", REPO + r"/settings")
def settings(exchange: Exchange, groups: Groups) -> Answer:
    repo, asked = writable(exchange, groups), exchange.json()
    if "private" in asked or "visibility" in asked:
        repo.private = asked.get("private", asked.get("visibility") == "private")
    repo.gated = asked.get("gated", repo.gated)
    return reply({"private": repo.private, "gated": repo.gated})


@API.on("POST", REPO + r"/branch/(?P<branch>[^/]+)")
def create_branch(exchange: Exchange, groups: Groups) -> Answer:
    repo, asked = writable(exchange, groups), exchange.json()
    ref = f"refs/heads/{groups['branch']}"
    with repo.lock:
        start = commit(repo, asked.get("startingPoint", "main"))
        if ref in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[ref] = start.oid
    return reply({})


@API.on("DELETE", REPO + r"/branch/(?P<branch>[^/]+)")
def delete_branch(exchange: Exchange, groups: Groups) -> Answer:
    repo = writable(exchange, groups)
    if groups["branch"] == "main":
        raise Refused(403, "Cannot delete refs/heads/main")
    if repo.refs.pop(f"refs/heads/{groups['branch']}", None) is None:
        raise Refused(404, f"Reference does not exist: {groups['branch']}", "RevisionNotFound")
    return reply({})


@API.on("POST", REPO + r"/tag/(?P<revision>[^/]+)")
def create_tag(exchange: Exchange, groups: Groups) -> Answer:
    repo, asked = writable(exchange, groups), exchange.json()
    ref = f"refs/tags/{asked['tag']}"
    if ref in repo.refs:
        raise Refused(409, "Tag reference exists already")
    repo.refs[ref] = commit(repo, groups["revision"]).oid
    return reply({})


@API.on("POST", REPO + r"/discussions")
def discuss(exchange: Exchange, groups: Groups) -> Answer:
    """A pull request without a commit, as upload_folder opens one."""
    repo, asked = readable(exchange, groups), exchange.json()
    token = exchange.hub.who(exchange.request)
    if token is None or token.role != "write":
        raise Refused(403, "Forbidden: you must use a token with write permission")
    return reply({"num": open_pull(repo, asked["title"])})


def open_pull(repo: Repo, title: str) -> int:
    with repo.lock:
        repo.pulls.append(title)
        repo.refs[f"refs/pr/{len(repo.pulls)}"] = repo.at("main").oid
        return len(repo.pulls)


@API.on("GET", REPO + r"/discussions/(?P<number>\d+)")
def discussion(exchange: Exchange, groups: Groups) -> Answer:
    repo = readable(exchange, groups)
    number = int(groups["number"])
    return reply(
        {
            "num": number,
            "title": repo.pulls[number - 1],
            "author": {"name": "user"},
            "createdAt": stamp(repo.commits[0]),
            "status": "open",
            "repo": {"name": repo.id, "type": repo.kind},
            "isPullRequest": True,
            "events": [],
            "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main"},
            "diff": "",
        }
    )
