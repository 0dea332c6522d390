"""One call of the library: how often it is made, how long it may take, what its failures become."""

from __future__ import annotations

import time
from email.utils import formatdate
from pathlib import Path

import pytest

from qconvert.hub.client import asked_to_wait
from tests.hub.asking import ask
from tests.hub.server import Hub

TOKEN = "hf_ToKenOfAlice"
CALLS = """
from huggingface_hub import CommitOperationAdd, HfApi, get_session

def commit(parent, text):
    added = CommitOperationAdd("x.txt", text.encode())
    options = {"commit_message": text, "parent_commit": parent}
    return HfApi().create_commit("org/model", [added], **options).oid

def job(what, *args, **options):
    if what == "info":
        retries, = args
        read = lambda: HfApi().model_info("org/model").sha
        return {"sha": client.call(read, "org/model", retries=retries)}
    if what == "commit":
        write = lambda: commit(*args)
        return {"sha": client.call(write, "org/model", write=True, retries=0)}
    if what == "upload":
        added = [CommitOperationAdd("x.safetensors", b"x" * 1000)]
        client.call(lambda: HfApi().preupload_lfs_files("org/model", added), "org/model", retries=0)
    if what == "mistake":
        def mistaken():
            raise RuntimeError("dictionary changed size")
        try:
            client.call(mistaken, "org/model", retries=3)
        except RuntimeError as e:
            return {"raised": str(e)}
    if what == "nobody":
        try:
            client.call(lambda: get_session().get("http://127.0.0.1:9"), "org/model")
        except QConvertError as e:
            limits = get_session().timeout  # the library has made a new session since
            return {"error": type(e).__name__, "timeout": [limits.connect, limits.read]}
"""


def test_what_may_pass_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    head = hub.add_repo("org/model", {"config.json": b"{}"}).at().oid
    path = "GET /api/models/org/model"
    env = hub.env(tmp_path)
    for kind in ("status:503", "reset", "429"):
        hub.fault(path, kind, seconds=1)
    (answer,), _ = ask(CALLS, [("info", 3)], env)
    assert answer == {"sha": head}
    last, answered = hub.requests(path)[2:]
    assert answered.started - last.started > 1  # as the server asked

    seen = len(hub.requests(path))
    hub.fault(path, "status:500", times=4)
    (answer, once), _ = ask(CALLS, [("info", 2), ("info", 0)], env)
    assert answer["error"] == once["error"] == "Network"
    assert "500" in answer["message"]
    assert len(hub.requests(path)) == seen + 3 + 1

    hub.fault(path, "status:422", times=9)
    (answer,), _ = ask(CALLS, [("info", 3)], env)
    assert answer["error"] == "HubError"
    assert len(hub.requests(path)) == seen + 5  # what is refused is refused


def test_refused_writes(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", TOKEN, orgs=["org"])
    hub.add_user("alice", "hf_ReadOnly", role="read")
    head = hub.add_repo("org/model", {"config.json": b"{}"}).at().oid
    jobs = [("commit", head, "one"), ("commit", head, "two")]
    (done, moved), _ = ask(CALLS, jobs, hub.env(tmp_path, TOKEN))
    assert done["sha"] == hub.repo("org/model").at().oid
    assert moved["error"] == "RevisionMoved"
    (forbidden,), _ = ask(CALLS, jobs[:1], hub.env(tmp_path, "hf_ReadOnly"))
    assert forbidden["error"] == "Forbidden"
    assert "write to org/model" in forbidden["message"]
    assert f"{hub.endpoint}/settings/tokens" in forbidden["hint"]
    assert "hf_" not in str(forbidden).replace("hf_hub", "")


def test_a_runtime_error_is_the_librarys_or_a_mistake(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", TOKEN, orgs=["org"])
    hub.add_repo("org/model", {"config.json": b"{}"})
    fault = hub.fault("PUT /upload/", "status:400", times=9)  # "Error while uploading …"
    (refused, mistaken), _ = ask(CALLS, [("upload",), ("mistake",)], hub.env(tmp_path, TOKEN))
    assert fault.seen
    assert refused["error"] == "Network"
    assert mistaken == {"raised": "dictionary changed size"}


def test_every_session_has_timeouts(hub: Hub, tmp_path: Path) -> None:
    (answer,), stderr = ask(CALLS, [("nobody",)], hub.env(tmp_path))
    assert answer["error"] == "Network"
    assert None not in answer["timeout"]
    assert stderr == ""


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "²"}, None),
        ({"retry-after": "Fri, 13 Feb 2009 23:31:30 GMT"}, 0),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 56),
        ({"ratelimit": '"api"; r=0; t=55'}, 56),
        ({"ratelimit": '"api";r=12;t=55'}, None),  # there on every answer
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_to_wait(headers) == seconds


def test_a_date_to_wait_for() -> None:
    wait = asked_to_wait({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert wait is not None
    assert 0 < wait <= 100
