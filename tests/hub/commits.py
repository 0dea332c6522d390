"""Writing routes: what a file will be, where its bytes go, and the commit that names them."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

from tests.hub.access import commit, writable
from tests.hub.api import REPO, front_matter
from tests.hub.repos import open_pull
from tests.hub.storage import REGULAR_LIMIT, Blob, Entry, Files, Repo, Stale, is_lfs
from tests.hub.transfer import Upload
from tests.hub.wire import Answer, Exchange, Refused, Routes, reply

API = Routes()
Groups = dict[str, str]
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LFS_JSON = "application/vnd.git-lfs+json"


@API.on("POST", "/api/validate-yaml")
def validate_yaml(exchange: Exchange, _: Groups) -> Answer:
    content = exchange.json()["content"]
    errors, notes = [], []
    if not content.startswith("---"):
        notes.append("empty or missing yaml metadata in repo card")
    elif not (card := front_matter(content.encode())):
        errors.append("Invalid YAML in the repo card's metadata")
    else:
        errors = list(_complaints(card))
    said: dict[str, Any] = {"errors": [{"message": e} for e in errors]}
    said["warnings"] = [{"message": note} for note in notes]
    return reply(said, 400 if errors else 200)


def _complaints(card: dict[str, Any]) -> list[str]:
    """What is wrong with a card's metadata, of what tools get wrong."""
    found = []
    for key in ("license", "pipeline_tag", "library_name", "license_name", "license_link"):
        if key in card and not isinstance(card[key], str):
            found.append(f'"{key}" must be a string')
    if card.get("license") == "other" and "license_name" not in card:
        found.append('"license_name" is required when "license" is "other"')
    if isinstance(card.get("license_name"), str) and not re.fullmatch(
        r"[a-z0-9-.]+", card["license_name"]
    ):
        found.append('"license_name" must be lowercase, digits, dots and hyphens')
    if card.get("base_model_relation", "quantized") not in RELATIONS:
        found.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for key in ("tags", "base_model", "language", "datasets"):
        values = card.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            found.append(f'"{key}" must be a string or a list of strings')
    for base in [card["base_model"]] if isinstance(card.get("base_model"), str) else []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            found.append('"base_model" must be the id of a repository')
    for model in card.get("model-index") or []:
        for result in model.get("results") or [{}]:
            metrics = result.get("metrics") or [{}]
            if not (
                model.get("name")
                and result.get("task", {}).get("type")
                and {"type", "name"} <= result.get("dataset", {}).keys()
                and all({"type", "value"} <= metric.keys() for metric in metrics)
            ):
                found.append('"model-index" needs name, task.type, dataset and metrics')
    return found


@API.on("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
def preupload(exchange: Exchange, groups: Groups) -> Answer:
    repo = writable(exchange, groups)
    at = commit(repo, groups["revision"])
    found = []
    for file in exchange.json()["files"]:
        sample = base64.b64decode(file.get("sample", ""))
        lfs = is_lfs(file["path"], file["size"], sample)
        known = at.files.get(file["path"])
        oid = {"oid": known.etag} if known else {}
        mode = "lfs" if lfs else "regular"
        found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
    return reply({"files": found})


@API.on("POST", r"(?:/(?P<kind>datasets|spaces))?/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def batch(exchange: Exchange, groups: Groups) -> Answer:
    exchange.request.query = exchange.request.query or "create_pr=1"  # the client does not say
    repo, asked = writable(exchange, groups), exchange.json()
    objects = [_action(exchange, repo, o["oid"], o["size"]) for o in asked["objects"]]
    answer = reply({"transfer": "multipart", "objects": objects, "hash_algo": "sha256"})
    answer.headers["Content-Type"] = LFS_JSON
    return answer


def _action(exchange: Exchange, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    hub = exchange.hub
    if oid in repo.lfs:
        return {"oid": oid, "size": size}
    upload = Upload.begin(hub, repo, oid, size)
    prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
    verify = {"href": f"{hub.endpoint}/{prefix}{repo.id}.git/info/lfs/objects/verify", "header": {}}
    if size <= hub.part_size:
        href, header = hub.cdn + hub.sign(f"/upload/{upload.key}/1"), {}
    else:
        count = math.ceil(size / hub.part_size)
        href = f"{hub.endpoint}/api/complete_multipart?uploadId={upload.key}"
        header = {"chunk_size": str(hub.part_size)}
        for number in range(1, count + 1):
            header[f"{number:05}"] = hub.cdn + hub.sign(f"/upload/{upload.key}/{number}")
    actions = {"upload": {"href": href, "header": header}, "verify": verify}
    return {"oid": oid, "size": size, "authenticated": True, "actions": actions}


@API.on("POST", "/api/complete_multipart")
def complete(exchange: Exchange, _: Groups) -> Answer:
    asked = exchange.json()
    upload = exchange.hub.uploads.get(exchange.request.params["uploadId"])
    if upload is None or asked["oid"] != upload.oid:
        raise Refused(404, "The specified upload does not exist.")
    upload.complete([part["etag"].strip('"') for part in asked["parts"]])
    return reply({"location": upload.oid})


@API.on("POST", r"(?:/(?P<kind>datasets|spaces))?/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/verify")
def verify(exchange: Exchange, groups: Groups) -> Answer:
    exchange.request.query = exchange.request.query or "create_pr=1"
    repo, asked = writable(exchange, groups), exchange.json()
    known = repo.lfs.get(asked["oid"])
    if known is None or known.size != asked["size"]:
        raise Refused(422, "LFS object is not there or has another size")
    return reply({"message": "ok"})


@API.on("POST", REPO + r"/commit/(?P<revision>[^/]+)")
def make_commit(exchange: Exchange, groups: Groups) -> Answer:
    repo = writable(exchange, groups)
    hub, token = exchange.hub, exchange.hub.who(exchange.request)
    lines = [json.loads(line) for line in exchange.body().splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header":
        raise Refused(400, "The first line must be the header")
    header = lines[0]["value"]
    pull = exchange.request.params.get("create_pr") == "1"
    ref = repo.ref(groups["revision"])
    with repo.lock:
        if ref is None or ref.startswith("refs/tags/"):
            raise Refused(404, f"Invalid rev id: {groups['revision']}", "RevisionNotFound")
        parent = header.get("parentCommit")
        if parent and parent != repo.refs[ref]:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(ref).files)
        for line in lines[1:]:
            _apply(repo, files, line["key"], line["value"])
        if pull:
            number = open_pull(repo, header["summary"])
            ref = f"refs/pr/{number}"
        author = token.user.name if token else ""
        try:
            made = repo.commit(
                ref, files, header["summary"], header.get("description", ""), author, parent
            )
        except Stale:
            raise Refused(
                412, "A commit has happened since. Please refresh and try again."
            ) from None
    url = f"{hub.endpoint}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"
    said = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
    said["hookOutput"] = ""
    if pull:
        said["pullRequestUrl"] = f"{url}/discussions/{number}"
    return reply(said)


def _apply(repo: Repo, files: Files, key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if path.startswith("/") or {"..", ".", "", ".git"} & set(path.rstrip("/").split("/")):
        raise Refused(400, f"Invalid path: {path}")
    if key == "file":
        content = value["content"]
        data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
        if len(data) > REGULAR_LIMIT:
            raise Refused(400, f"Files larger than 10 MB must be stored as LFS: {path}")
        files[path] = Entry(Blob.of(data), False)
    elif key == "lfsFile":
        blob = repo.lfs.get(value["oid"])
        if blob is None or value.get("size", blob.size) != blob.size:
            message = (
                "Your push was rejected because an LFS pointer pointed to a file that does not"
            )
            raise Refused(400, f"{message} exist: {path}")
        files[path] = Entry(blob, True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise Refused(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise Refused(400, f"Unknown operation: {key}")
