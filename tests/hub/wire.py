"""What handlers of requests see: a request with its body to be read, an answer, an error, routes.

Handlers return an Answer or raise Refused. Bodies that come in are read a megabyte at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hub.faults import Fault
from tests.hub.storage import CHUNK, Blob

if TYPE_CHECKING:
    from tests.hub.handler import Handler
    from tests.hub.server import Hub


@dataclass
class Request:
    """One line of the log. It is there from the moment the request is read; counts grow later."""

    host: str
    """hub, or cdn for the second host."""
    method: str
    path: str
    """Unquoted."""
    query: str
    headers: dict[str, str]
    """Lower-case names."""
    started: float
    status: int = 0
    """0 while there is no answer, and where none was given."""
    bytes_out: int = 0
    """Of the body."""
    bytes_in: int = 0
    ended: float = 0.0
    """When the last byte of the answer was handed on, on the clock of `started`; 0 before that."""

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ").strip() or None

    @property
    def params(self) -> dict[str, str]:
        return {k: v[-1] for k, v in parse_qs(self.query, keep_blank_values=True).items()}


@dataclass
class Answer:
    status: int = 200
    body: bytes | Blob = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None
    """The bytes of the body that go out."""

    @property
    def length(self) -> int:
        size = self.body.size if isinstance(self.body, Blob) else len(self.body)
        return (size if self.stop is None else self.stop) - self.start


def reply(data: object, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps(data).encode()
    return Answer(status, body, {"Content-Type": "application/json; charset=utf-8"} | named)


class Refused(Exception):
    """An error as the Hub words it: JSON, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        if code:
            headers["X_Error_Code"] = code
        self.answer = reply({"error": message}, status, X_Error_Message=message, **headers)


class Broken(Exception):
    """The connection ends here, without more of an answer."""


Handle = Callable[["Exchange", dict[str, str]], Answer]


class Routes:
    """A table of (method, pattern of the quoted path) → handler; groups arrive unquoted."""

    def __init__(self) -> None:
        self.table: list[tuple[str, re.Pattern[str], Handle]] = []

    def on(self, method: str, pattern: str) -> Callable[[Handle], Handle]:
        def add(handle: Handle) -> Handle:
            self.table.append((method, re.compile(pattern), handle))
            return handle

        return add

    def find(self, method: str, path: str) -> tuple[Handle, dict[str, str]] | None:
        for known, pattern, handle in self.table:
            if known == method and (found := pattern.fullmatch(path)):
                groups = found.groupdict()
                return handle, {k: unquote(v) for k, v in groups.items() if v is not None}
        return None


class Exchange:
    """A request with its body still to be read."""

    def __init__(self, hub: Hub, request: Request, handler: Handler, fault: Fault | None) -> None:
        self.hub, self.request, self.fault, self._handler = hub, request, fault, handler
        self._left: int | None = int(request.headers.get("content-length", 0))
        if request.headers.get("transfer-encoding", "").lower() == "chunked":
            self._left = None
        self.length = self._left
        """Of the body; None if it comes in chunks."""

    def pieces(self) -> Iterator[memoryview]:
        """The body as it comes; a piece is valid until the next."""
        buffer = memoryview(bytearray(min(CHUNK, self._left or CHUNK) or 1))
        bucket = self.hub.up
        fault = self.fault
        point = fault.point(self.length) if fault and fault.in_body and self.length else None
        while count := self._next(bucket.piece(len(buffer))):
            bucket.take(count)
            got = self._handler.rfile.readinto(buffer[:count])
            if not got:
                raise Broken
            self.request.bytes_in += got
            if self._left is not None:
                self._left -= got
            if fault and point is not None and self.request.bytes_in > point:
                self._handler.strike(fault)
                if fault.kind == "corrupt":
                    buffer[point - self.request.bytes_in + got] ^= 1
                point = None
            yield buffer[:got]
            if self._left is None:
                self._chunk -= got

    _chunk = 0

    def _next(self, most: int) -> int:
        """Bytes that may be read now; 0 at the end of the body."""
        if self._left is not None:
            return min(most, self._left)
        if self._chunk == 0:
            line = self._handler.rfile.readline().strip() or self._handler.rfile.readline().strip()
            self._chunk = int(line.split(b";")[0], 16)
            if self._chunk == 0:
                self._handler.rfile.readline()
                self._left = 0
        return min(most, self._chunk)

    def body(self) -> bytes:
        return b"".join(bytes(piece) for piece in self.pieces())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def drain(self) -> None:
        for _ in self.pieces():
            pass
