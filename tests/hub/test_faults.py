"""Each fault of the local Hub does what it says: seen raw on the wire, and by the real client."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub.client import run
from tests.hub.server import Hub

BODY = bytes(range(256)) * 500
FILE = "/org/model/resolve/main/model.safetensors"


@pytest.fixture
def ready(hub: Hub) -> Hub:
    hub.add_repo("org/model", {"model.safetensors": BODY, "config.json": b"{}"})
    hub.add_user("alice", "hf_alice")
    return hub


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower-case) and body of one GET that follows no redirect."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=10)
    try:
        connection.request("GET", f"{at.path}?{at.query}", headers=headers)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, named, answer.read()
    finally:
        connection.close()


def cdn(hub: Hub) -> str:
    status, headers, _ = get(hub.endpoint + FILE)
    assert status == 302
    assert not headers["location"].startswith(hub.endpoint)
    return headers["location"]


def test_ranges(ready: Hub) -> None:
    url = cdn(ready)
    cases = [("0-9", 0, 10), ("100-", 100, None), ("-7", -7, None), ("5-99999999", 5, None)]
    for asked, start, stop in cases:
        status, headers, body = get(url, Range=f"bytes={asked}")
        assert (status, body) == (206, BODY[start:stop])
        first = start % len(BODY)
        expected = f"bytes {first}-{first + len(body) - 1}/{len(BODY)}"
        assert headers["content-range"] == expected
    status, headers, _ = get(url, Range=f"bytes={len(BODY)}-")
    assert (status, headers["content-range"]) == (416, f"bytes */{len(BODY)}")


def test_cut_and_reset(ready: Hub) -> None:
    url = cdn(ready)
    ready.fault("^GET /repos/.*filename=model.safetensors", "cut", after_bytes=1000)
    with pytest.raises(http.client.IncompleteRead) as cut:
        get(url)
    assert cut.value.partial == BODY[:1000]
    ready.fault("^GET /repos/", "reset")
    with pytest.raises(ConnectionResetError):
        get(url)
    ready.fault("^GET /org", "cut", times=2)
    for _ in range(2):
        with pytest.raises((http.client.RemoteDisconnected, http.client.IncompleteRead)):
            get(ready.endpoint + FILE)
    assert get(url)[2] == BODY


def test_corrupt_is_one_bit(ready: Hub) -> None:
    url = cdn(ready)
    for after, asked in ((None, None), (0, None), (len(BODY) - 1, None), (3, "bytes=7-20")):
        ready.fault("^GET /repos/", "corrupt", after_bytes=after)
        body = get(url, **({"Range": asked} if asked else {}))[2]
        whole = BODY[7:21] if asked else BODY
        wrong = [i for i, (a, b) in enumerate(zip(body, whole, strict=True)) if a != b]
        assert wrong == [len(whole) // 2 if after is None else after]
    assert get(url)[2] == BODY


def test_statuses(ready: Hub) -> None:
    ready.fault("/api/models", "429", seconds=7)
    status, headers, _ = get(f"{ready.endpoint}/api/models/org/model")
    assert (status, headers["retry-after"]) == (429, "7")
    ready.fault("/api/models", "status:503", times=2)
    assert [get(f"{ready.endpoint}/api/models/org/model")[0] for _ in range(3)] == [503, 503, 200]
    ready.fault("/api/models", "expire-token")
    alice = {"Authorization": "Bearer hf_alice"}
    for _ in range(2):
        status, headers, _ = get(f"{ready.endpoint}/api/models/org/model", **alice)
        assert status == 401
        assert headers["x-error-message"] == "Invalid credentials in Authorization header"
    url = cdn(ready)
    ready.fault("/repos/", "expire-token")
    assert [get(url)[0] for _ in range(2)] == [403, 200]
    ready.url_seconds = -1
    assert get(cdn(ready))[0] == 403
    assert get(url.replace("Signature=", "Signature=0"))[0] == 403
    with pytest.raises(ValueError, match="no such fault"):
        ready.fault("x", "explode")


def took(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def test_slow_and_bandwidth(ready: Hub) -> None:
    url = cdn(ready)
    ready.fault("/repos/", "slow", seconds=0.3)
    assert took(lambda: get(url)) >= 0.3
    ready.fault("/repos/", "slow", seconds=0.3, after_bytes=1000)
    assert took(lambda: get(url)) >= 0.3
    ready.bandwidth(down=len(BODY) / 0.5)  # of which a tenth is credit
    assert took(lambda: get(url)) >= 0.39


def test_the_log_and_leaks(hub: Hub) -> None:
    hub.add_repo("org/model", {"model.safetensors": BODY})
    url = cdn(hub)
    get(url, Range="bytes=10-109")
    asked = hub.requests(r"^GET /repos/org/model/\w+\?filename=model.safetensors")
    assert [(r.host, r.status, r.bytes_out, r.token) for r in asked] == [("cdn", 206, 100, None)]
    assert asked[0].headers["range"] == "bytes=10-109"
    get(url, Authorization="Bearer hf_lost")
    assert [token for token, _ in hub.leaks] == ["hf_lost"]
    hub.leaks.clear()


PUSH = """
made = api.create_repo("alice/new", exist_ok=True)
try:
    files = [CommitOperationAdd("a.safetensors", b"a" * 400_000)]
    api.create_commit("alice/new", files, commit_message="a")
except Exception as e:
    said["error"] = type(e).__name__
said["files"] = sorted(api.list_repo_files("alice/new"))
"""


def test_the_client_pushes_through_faults(ready: Hub, tmp_path: Path) -> None:
    ready.bandwidth(up=4e6)
    cut = ready.fault("^PUT /upload", "cut", after_bytes=1000)
    corrupt = ready.fault("^PUT /upload", "corrupt")
    said = run(ready, tmp_path, PUSH, "hf_alice")
    assert (cut.seen, corrupt.seen) == (1, 1)
    assert said == {"error": "RuntimeError", "files": [".gitattributes"]}, "S3 refuses other bytes"
    lost = ready.fault("^POST .*/commit/main", "drop-answer")
    said = run(ready, tmp_path, PUSH, "hf_alice")
    assert lost.seen == 1
    assert said == {"error": "RemoteProtocolError", "files": [".gitattributes", "a.safetensors"]}
    assert [commit.title for commit in ready.repo("alice/new").history()] == ["a", "initial commit"]
    assert sum(request.bytes_in for request in ready.requests("^PUT")) > 800_000


def test_the_client_resumes(ready: Hub, tmp_path: Path) -> None:
    fault = ready.fault("^GET /repos/", "cut", after_bytes=1000)
    code = 'said["size"] = Path(hf_hub_download("org/model", "model.safetensors")).stat().st_size'
    assert run(ready, tmp_path, code, None) == {"size": len(BODY)}
    assert fault.seen == 1
