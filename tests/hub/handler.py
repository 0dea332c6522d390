"""A connection of the server: reads requests, sends answers, and breaks either on demand.

Bodies that lie on disk go out by sendfile.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.hub.faults import Fault
from tests.hub.storage import CHUNK, Blob
from tests.hub.wire import Answer, Broken, Exchange, Refused, Request, reply

if TYPE_CHECKING:
    from tests.hub.server import Hub

LARGE = 8 << 20
"""Bytes of one sendfile where nothing is limited."""


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
        time.sleep(self.hub.delay)
        fault = self.hub.faults.strike(request.line)
        exchange = Exchange(self.hub, request, self, fault)
        answer = self.answered(exchange, raw)
        exchange.drain()
        if fault and fault.kind == "drop-answer":
            raise Broken
        self.send(request, answer, fault)
        request.ended = time.monotonic()

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
        if fault.kind.startswith("echo:"):
            said = f"No access with {request.headers.get('authorization')}"
            raise Refused(int(fault.kind[5:]), said)
        if fault.kind == "expire-token":
            if request.token in self.hub.grants:
                self.hub.grants[request.token].expires = 0
            elif request.host == "cdn":
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
