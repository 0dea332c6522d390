"""A small Hub on this machine, for the real huggingface_hub to talk to.

Two servers in threads: the Hub, and a second host (the "CDN") that serves and takes LFS content by
signed URLs and must never see a token. The client reads its endpoint at import, so tests run it in
child processes with `hub.env(...)`. Everything a test may want to break is a fault (`hub.fault`);
everything it may want to know is in `hub.log`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.hub import api, commits, repos, transfer, xet
from tests.hub.faults import Bucket, Fault, Faults
from tests.hub.handler import Handler
from tests.hub.storage import Blob, Repo
from tests.hub.wire import Answer, Exchange, Refused, Request

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class User:
    name: str
    orgs: list[str] = field(default_factory=list)


@dataclass
class Token:
    user: User
    role: str
    """read or write."""
    expired: bool


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: Hub, role: str, host: str) -> None:
        self.hub, self.role = hub, role
        super().__init__((host, 0), Handler)

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away; what is wrong with the server is in hub.errors

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"


class Hub:
    """A context manager. `errors` holds tracebacks of the server's own, and must stay empty."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.renamed: dict[tuple[str, str], str] = {}
        self.users: dict[str, User] = {}
        self.tokens: dict[str, Token] = {}
        self.log: list[Request] = []
        self.leaks: list[tuple[str, str]] = []
        """(token, request line) of every token that the second host was shown."""
        self.errors: list[str] = []
        self.faults = Faults()
        self.down, self.up = Bucket(), Bucket()
        self.delay = 0.0
        """Seconds before every answer, as a distant server takes."""
        self.page = 1000
        """Entries of one page of a listing."""
        self.part_size = 512 << 20
        """LFS uploads larger than this come in parts of it."""
        self.url_seconds = 3600.0
        """How long a signed URL lives."""
        self.uploads: dict[str, transfer.Upload] = {}
        self.grants: dict[str, xet.Grant] = {}
        """Tokens of the second host, for Xet."""
        self.xorbs: dict[str, tuple[Path, list[tuple[int, int]]]] = {}
        """Hash → where it lies, and (offset, length) of its chunks."""
        self.xet_names: dict[str, str] = {}
        """sha256 → hash by which a file came by Xet."""
        self.connections: set[socket.socket] = set()
        self._secret = secrets.token_hex(8)

    def __enter__(self) -> Hub:
        self.folder = Path(tempfile.mkdtemp(prefix="hub-"))
        """Where uploads go; removed at the end."""
        self._hub = _Server(self, "hub", "127.0.0.1")
        try:
            self._cdn = _Server(self, "cdn", "127.0.0.2")
        except OSError:  # only Linux has all of 127/8
            self._cdn = _Server(self, "cdn", "127.0.0.1")
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def endpoint(self) -> str:
        return self._hub.url

    @property
    def cdn(self) -> str:
        return self._cdn.url

    # what there is

    def add_user(
        self,
        name: str,
        token: str,
        orgs: list[str] | None = None,
        role: str = "write",
        expired: bool = False,
    ) -> User:
        """A user, or one more token of a user."""
        user = self.users.setdefault(name, User(name))
        user.orgs += orgs or []
        self.tokens[token] = Token(user, role, expired)
        return user

    def expire(self, token: str | None) -> None:
        """From now on the token is refused."""
        if token in self.tokens:
            self.tokens[token].expired = True

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | Blob] | Path | None = None,
        *,
        kind: str = "model",
        private: bool = False,
        gated: str | bool = False,
        lfs: Callable[[str], bool] | None = None,
    ) -> Repo:
        """A repository with one commit of `files`, or of those of a folder, which stay there.

        It also has the .gitattributes that every repository of the Hub starts with.
        """
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, private, gated)
        if isinstance(files, Path):
            paths = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path for path in paths}
        if files:
            repo.push(files, lfs=lfs, title="upload")
        return repo

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def rename(self, old: str, new: str, kind: str = "model") -> None:
        """The old id (with or without an owner, as `gpt2`) redirects to the new one from now on."""
        if repo := self.repos.pop((kind, old), None):
            repo.id = new
            self.repos[kind, new] = repo
        self.renamed[kind, old] = new

    # what goes wrong

    def fault(
        self,
        match: str,
        kind: str,
        times: int = 1,
        after_bytes: int | None = None,
        seconds: float = 1.0,
    ) -> Fault:
        """Breaks the next `times` requests of which `METHOD path?query` matches `match`.

        cut, reset: the connection ends (FIN, RST) after `after_bytes` of the request's body if it
        has one, else of the answer's; in the middle unless told; before the answer if that has no
        body. corrupt: one bit of that byte is flipped. slow: `seconds` of silence there, or before
        the answer unless told. 429: with Retry-After `seconds`. status:503 and others: that answer.
        echo:403 and others: the same, with the token in what it says, as a careless proxy would.
        drop-answer: it is done, but the connection ends without an answer. expire-token: the token
        of the request is refused from then on; where there is none, the signed URL is too old.
        A file's name is in the query of its URL on the second host.
        """
        fault = Fault(re.compile(match), kind, times, after_bytes, seconds)
        self.faults.add(fault)
        return fault

    def bandwidth(self, down: float | None = None, up: float | None = None) -> None:
        """Bytes a second that the whole server sends and takes; None is no limit."""
        self.down.rate, self.up.rate = down, up

    # what is seen

    def requests(self, match: str) -> list[Request]:
        """The requests so far of which `METHOD path?query` matches."""
        return [request for request in list(self.log) if re.search(match, request.line)]

    def env(self, home: Path, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """The whole environment of a child process whose Hub this is."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept.pop("HUGGING_FACE_HUB_TOKEN", None)
        set_here = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,127.0.0.2",
            "no_proxy": "127.0.0.1,127.0.0.2",
            "PYTHONPATH": str(ROOT),
        }
        if token is not None:
            set_here["HF_TOKEN"] = token
        if xet:
            set_here |= {
                "HF_XET_XORB_COMPRESSION_POLICY": "none",
                "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms",  # rather than three seconds
            }
        else:
            set_here["HF_HUB_DISABLE_XET"] = "1"
        return kept | set_here

    # what answers

    def lfs(self, repo_id: str, sha256: str) -> Blob:
        """An LFS object of a repository of any kind."""
        for (_, known), repo in list(self.repos.items()):
            if known == repo_id and sha256 in repo.lfs:
                return repo.lfs[sha256]
        raise Refused(404, "NoSuchKey")

    def xet_name(self, sha256: str) -> str:
        return self.xet_names.get(sha256) or xet.name(sha256)

    def answer(self, exchange: Exchange, path: str) -> Answer:
        """The answer to a request; `path` is still quoted."""
        request = exchange.request
        if request.host == "cdn":
            if request.token and request.token not in self.grants:
                self.leaks.append((request.token, request.line))
            routes = [transfer.CDN]
        else:
            self.who(request)
            if moved := self._moved(path):
                query = f"?{request.query}" if request.query else ""
                return Answer(307, b"", {"Location": moved + query})
            routes = [api.API, repos.API, commits.API, xet.API, transfer.HUB]
        for table in routes:
            if found := table.find(request.method.replace("HEAD", "GET"), path):
                handle, groups = found
                return handle(exchange, groups)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def who(self, request: Request) -> Token | None:
        """Who asks; a token that is not valid is refused wherever it is shown."""
        if request.token is None:
            return None
        token = self.tokens.get(request.token)
        if token is None or token.expired:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def _moved(self, path: str) -> str | None:
        """Where a renamed repository, or one named in other letters, is now."""
        for kind in ("model", "dataset", "space"):
            names = {new.lower(): new for k, new in self.repos if k == kind}
            names |= {old.lower(): new for (k, old), new in self.renamed.items() if k == kind}
            for start in (f"/api/{kind}s/", "/" if kind == "model" else f"/{kind}s/"):
                if not path.startswith(start):
                    continue
                parts = path[len(start) :].split("/")
                for count in (2, 1):
                    asked = "/".join(parts[:count]).removesuffix(".git")
                    new = names.get(asked.lower())
                    if new and new != asked:
                        return start + new + path[len(start) + len(asked) :]
        return None

    def sign(self, path: str, **params: Any) -> str:
        """A path on the second host with a signature that expires."""
        expires = str(time.time() + self.url_seconds)
        query = {**params, "Expires": expires, "Signature": self.signature(path, expires)}
        return f"{path}?" + "&".join(f"{name}={quote(str(v))}" for name, v in query.items())

    def signature(self, path: str, expires: str) -> str:
        return hashlib.sha256(f"{self._secret} {path} {expires}".encode()).hexdigest()[:32]
