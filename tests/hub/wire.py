"""HTTP/1.1 of the server: one request in, one answer out, counted, limited, and broken on demand.

Handlers return an Answer or raise Refused. Bodies that lie on disk go out by sendfile; bodies that
come in are read a megabyte at a time.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hub.faults import Fault
from tests.hub.storage import CHUNK, Blob

if TYPE_CHECKING:
    from tests.hub.server import Hub

LARGE = 8 << 20
"""Bytes of one sendfile where nothing is limited."""


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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    rbufsize = 1 << 16

    def setup(self) -> None:
        super().setup()
        self.hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self.role: str = self.server.role  # type: ignore[attr-defined]
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, Broken):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        raw, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.role, self.command, unquote(raw), query, headers, started=time.monotonic()
        )
        self.hub.log.append(request)
        fault = self.hub.faults.strike(request.line)
        exchange = Exchange(self.hub, request, self, fault)
        answer = self.answered(exchange, raw)
        exchange.drain()
        if fault and fault.kind == "drop-answer":
            raise Broken
        self.send(request, answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def answered(self, exchange: Exchange, raw: str) -> Answer:
        fault, request = exchange.fault, exchange.request
        try:
            if fault:
                self.prepare(fault, request, exchange)
            return self.hub.answer(exchange, raw)
        except Refused as e:
            return e.answer
        except (Broken, OSError):
            raise
        except Exception:  # noqa: BLE001 a bug of this server, shown by the fixture
            self.hub.errors.append(f"{request.line}\n{traceback.format_exc()}")
            return reply({"error": "Internal Error"}, 500)

    def prepare(self, fault: Fault, request: Request, exchange: Exchange) -> None:
        """Faults that take the place of an answer, or come before one."""
        if fault.kind == "429":
            wait = str(int(fault.seconds))
            raise Refused(
                429, "Too Many Requests", Retry_After=wait, RateLimit=f'"api";r=0;t={wait}'
            )
        if fault.kind.startswith("status:"):
            status = int(fault.kind[7:])
            raise Refused(status, HTTPStatus(status).phrase)
        if fault.kind == "expire-token":
            if request.host == "cdn":
                raise Refused(403, "Request has expired")
            self.hub.expire(request.token)
        if fault.kind == "slow" and fault.after_bytes is None:
            self.strike(fault)

    def strike(self, fault: Fault) -> None:
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind in ("cut", "reset"):
            if fault.kind == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()  # it holds the socket open
                self.connection.close()
            raise Broken

    def send(self, request: Request, answer: Answer, fault: Fault | None) -> None:
        request.status = answer.status
        length = answer.length
        headers = {"Content-Length": str(length), "Date": self.date_time_string()} | answer.headers
        head = f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        plain = (head + "\r\n").encode("latin-1")
        if request.method == "HEAD":
            length = 0
        struck = fault if fault and fault.in_body and request.bytes_in == 0 else None
        if struck and not length:
            self.strike(struck)
            struck = None
        if isinstance(answer.body, bytes) and not struck and length < CHUNK:
            request.bytes_out = length
            self.hub.down.take(length)
            self.connection.sendall(plain + answer.body[answer.start : answer.start + length])
            return
        self.connection.sendall(plain)
        if length:
            self.send_body(request, answer, struck)

    def send_body(self, request: Request, answer: Answer, fault: Fault | None) -> None:
        bucket = self.hub.down
        point = fault.point(answer.length) if fault else None
        sent, length = 0, answer.length
        body = answer.body.data if isinstance(answer.body, Blob) else answer.body
        with open(os.devnull if isinstance(body, bytes) else body, "rb") as file:
            while sent < length:
                count = min(bucket.piece(LARGE), length - sent)
                if point is not None and sent < point:
                    count = min(count, point - sent)
                if sent == point and fault:
                    if fault.kind != "corrupt":
                        self.strike(fault)
                    count = 1
                bucket.take(count)
                request.bytes_out += count
                offset = answer.start + sent
                if isinstance(body, bytes):
                    piece = body[offset : offset + count]
                elif count == 1:
                    file.seek(offset)
                    piece = file.read(1)
                else:
                    self.connection.sendfile(file, offset, count)
                    piece = b""
                if sent == point and fault and fault.kind == "corrupt":
                    piece = bytes([piece[0] ^ 1])
                self.connection.sendall(piece)
                sent += count
