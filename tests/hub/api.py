"""Reading routes of the API: who asks, what there is, what it holds."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from tests.hub.access import commit, find, readable, writable
from tests.hub.storage import Commit, Entry
from tests.hub.wire import Answer, Exchange, Refused, Routes, reply

API = Routes()
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
Groups = dict[str, str]


@API.on("GET", "/api/whoami-v2")
def whoami(exchange: Exchange, _: Groups) -> Answer:
    token = exchange.hub.who(exchange.request)
    if token is None:
        raise Refused(401, "Invalid username or password.")
    role = {"displayName": "token", "role": token.role}
    return reply(
        {
            "type": "user",
            "name": token.user.name,
            "fullname": token.user.name,
            "orgs": [{"type": "org", "name": org} for org in token.user.orgs],
            "auth": {"type": "access_token", "accessToken": role},
        }
    )


@API.on("GET", "/api/agent-harnesses")
def harnesses(_exchange: Exchange, _: Groups) -> Answer:
    return reply({})


@API.on("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
def info(exchange: Exchange, groups: Groups) -> Answer:
    repo = find(exchange, groups)
    at = commit(repo, groups.get("revision", "main"))
    blobs = exchange.request.params.get("blobs", "").lower() == "true"
    card = front_matter(at.files["README.md"].blob.read()) if "README.md" in at.files else {}
    data: dict[str, Any] = {
        "_id": at.oid[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": at.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "lastModified": stamp(at),
        "createdAt": stamp(repo.commits[0]),
        "downloads": 0,
        "likes": 0,
        "tags": tags(card),
        "siblings": [sibling(name, entry, blobs) for name, entry in sorted(at.files.items())],
    }
    if card:
        data["cardData"] = card
        data |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    if exchange.request.params.keys() & {"expand", "expand[]"}:
        lists = parse_qs(exchange.request.query)
        asked = {"id", "_id", *lists.get("expand", []), *lists.get("expand[]", [])}
        data = {key: value for key, value in data.items() if key in asked}
    return reply(data)


def sibling(name: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name}
    if blobs:
        found |= {"blobId": entry.oid, "size": entry.size}
        if entry.lfs:
            pointer = len(entry.pointer)
            found["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer}
    return found


def front_matter(readme: bytes) -> dict[str, Any]:
    """The YAML at the top of a card; {} where there is none that can be read."""
    found = re.match(rb"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", readme, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}


def tags(card: dict[str, Any]) -> list[str]:
    found = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        found.append(f"base_model:{base}")
        if relation := card.get("base_model_relation"):
            found.append(f"base_model:{relation}:{base}")
    return found + ([f"license:{card['license']}"] if "license" in card else [])


def stamp(at: Commit) -> str:
    return at.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def listed(exchange: Exchange, path: str, entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
        found["xetHash"] = exchange.hub.xet_name(entry.sha256)
    return found


def folder(path: str, at: Commit) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": at.oid[::-1]}


def paged(exchange: Exchange, items: list[Any]) -> Answer:
    """One page, with a Link to the next."""
    hub, request = exchange.hub, exchange.request
    start = int(request.params.get("cursor", "0"))
    stop = start + hub.page
    answer = reply(items[start:stop])
    if stop < len(items):
        asked = {name: value for name, value in request.params.items() if name != "cursor"}
        query = "&".join(
            f"{k}={quote(str(v), safe='')}" for k, v in {**asked, "cursor": stop}.items()
        )
        url = f"{hub.endpoint}{quote(request.path)}?{query}"
        answer.headers["Link"] = f'<{url}>; rel="next"'
    return answer


@API.on("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(exchange: Exchange, groups: Groups) -> Answer:
    at = commit(find(exchange, groups), groups["revision"])
    top = groups.get("path", "").strip("/")
    start = f"{top}/" if top else ""
    recursive = exchange.request.params.get("recursive", "").lower() == "true"
    found: dict[str, dict[str, Any]] = {}
    for name, entry in at.files.items():
        if not name.startswith(start):
            continue
        steps = name[len(start) :].split("/")
        for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
            above = start + "/".join(steps[:depth])
            found[above] = folder(above, at)
        if recursive or len(steps) == 1:
            found[name] = listed(exchange, name, entry)
    if top and not found:
        raise Refused(404, f'{top} does not exist on "{groups["revision"]}"', "EntryNotFound")
    return paged(exchange, [found[name] for name in sorted(found)])


@API.on("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(exchange: Exchange, groups: Groups) -> Answer:
    at = commit(find(exchange, groups), groups["revision"])
    body = exchange.body().decode()
    paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    found = []
    for path in paths:
        if path in at.files:
            found.append(listed(exchange, path, at.files[path]))
        elif any(name.startswith(path.rstrip("/") + "/") for name in at.files):
            found.append(folder(path.rstrip("/"), at))
    return reply(found)


@API.on("GET", REPO + r"/refs")
def refs(exchange: Exchange, groups: Groups) -> Answer:
    repo = find(exchange, groups)

    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    data = {"branches": under("refs/heads/"), "converts": [], "tags": under("refs/tags/")}
    if exchange.request.params.get("include_prs"):
        data["pullRequests"] = under("refs/pr/")
    return reply(data)


@API.on("GET", REPO + r"/commits/(?P<revision>[^/]+)")
def history(exchange: Exchange, groups: Groups) -> Answer:
    repo = find(exchange, groups)
    commit(repo, groups["revision"])
    items = [
        {
            "id": at.oid,
            "title": at.title,
            "message": at.message,
            "authors": [{"user": at.author}],
            "date": stamp(at),
        }
        for at in repo.history(groups["revision"])
    ]
    return paged(exchange, items)


@API.on("GET", REPO + r"/auth-check")
def may_read(exchange: Exchange, groups: Groups) -> Answer:
    readable(exchange, groups)
    return reply({})


@API.on("GET", REPO + r"/auth-check/write")
def may_write(exchange: Exchange, groups: Groups) -> Answer:
    writable(exchange, groups)
    return reply({})
