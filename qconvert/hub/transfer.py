"""Parts of a repository's files, by ranged requests, straight into the caller's memory.

A file's address at the Hub answers with a redirect to a signed URL at some storage host. The
redirect is followed by hand: the token goes to the Hub's own origin and to nobody else, and the
signed URL serves all further ranges of that file until it expires. A transfer that breaks is
continued from the byte where it broke.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event
from typing import Any
from urllib.parse import urljoin, urlsplit
from weakref import WeakSet

from qconvert.errors import CorruptFile, Network, printable
from qconvert.hub import client, failures
from qconvert.types import Repository

RETRIES = 6
"""Without progress in between: half a minute altogether."""
_PROGRESS = 1 << 16
"""Bytes after which a transfer counts as going well again."""
_SILENCE = 30.0
"""Seconds without a byte after which a connection is given up."""
_MOST_SKIPPED = 1 << 20
"""Bytes before the range that are read and dropped where a server ignores ranges."""
_HOPS = 6

_located: dict[tuple[str, str, str], str] = {}
"""Repository, commit and name → the URL, signed or not, that served this file last."""


class Fetcher:
    """Ranged reads, from any number of threads. `close` ends those under way, at once."""

    def __init__(self, *, own_session: bool = False) -> None:
        self._session = client.new_session() if own_session else None
        self._stop = Event()
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def into(
        self,
        out: memoryview,
        repository: Repository,
        name: str,
        start: int,
        received: Callable[[int], None] | None = None,
    ) -> None:
        """Fills `out` from byte `start` of a file on; `received` is told of bytes as they come.

        Raises the errors of `client.call`, and CorruptFile for a file of another size than the
        tree says. After `close` it raises.
        """
        transport = failures.httpx().TransportError
        filling = _Filling(out, start, received)
        backoff = client.Backoff(RETRIES, self._stop)
        well = 0
        while filling.left:
            headers: Mapping[str, str] = {}
            connected = True
            try:
                self._request(repository, name, filling)
                why: Exception = Network(f"the connection breaks within {repository.id}/{name}")
            except transport as e:
                why = failures.translated(e, repository.id, repository.commit)
                connected = failures.connected(e)
            except _Refused as e:
                why, headers = e.why, e.headers
            if filling.done - well >= _PROGRESS:
                backoff.reset()
                well = filling.done
            if filling.left and not backoff.wait(headers, connected=connected or bool(well)):
                raise why

    def close(self) -> None:
        self._stop.set()
        self._hang_up()
        if self._session is not None:
            self._session.close()

    def _request(self, repository: Repository, name: str, filling: _Filling) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url

        key = repository.id, repository.commit, name
        address = hf_hub_url(repository.id, name, revision=repository.commit)
        url = _located.get(key, address)
        for _ in range(_HOPS):
            at_hub = _origin(url) == _origin(constants.ENDPOINT)
            headers = client.request_headers() if at_hub else {}
            headers |= {"accept-encoding": "identity", "range": filling.range}
            session = self._session or get_session()
            with session.stream(
                "GET",
                url,
                headers=headers,
                follow_redirects=False,
                timeout=client.timeout(_SILENCE),
                extensions={"trace": self._trace} if self._session else {},
            ) as response:
                if response.has_redirect_location:
                    url = _target(url, response.headers["location"])
                    if constants.ENDPOINT.startswith("https:") and not url.startswith("https:"):
                        raise Network(f"the Hub leads to an address without https for {name}")
                    continue
                if response.status_code >= 400:
                    _located.pop(key, None)
                    raise _refusal(response, repository, name, at_hub)
                _located[key] = url
                filling.take(response, repository, name)
                return
        raise Network(f"redirects without an end for {repository.id}/{name}")

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Keeps the sockets of new connections, so that `close` can wake who waits for them."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._sockets.add(info["return_value"].get_extra_info("socket"))
            if self._stop.is_set():
                self._hang_up()

    def _hang_up(self) -> None:
        for each in list(self._sockets):
            with suppress(OSError):  # wakes a thread that waits for it; closing would not
                each.shutdown(socket.SHUT_RDWR)


class _Filling:
    """A buffer, how much of it is there, and where in the file it lies."""

    def __init__(self, out: memoryview, start: int, received: Callable[[int], None] | None) -> None:
        self.out, self.start, self.received = out, start, received
        self.done = 0

    @property
    def left(self) -> int:
        return len(self.out) - self.done

    @property
    def range(self) -> str:
        return f"bytes={self.start + self.done}-{self.start + len(self.out) - 1}"

    def take(self, response: Any, repository: Repository, name: str) -> None:
        """Copies the body of an answer; whatever of the range it lacks stays missing."""
        skip = self._skip(response, repository, name)
        for data in response.iter_raw():
            piece = memoryview(data)[skip : skip + self.left]
            skip = max(0, skip - len(data))
            self.out[self.done : self.done + len(piece)] = piece
            self.done += len(piece)
            if self.received is not None and piece:
                self.received(len(piece))
            if not self.left:
                break

    def _skip(self, response: Any, repository: Repository, name: str) -> int:
        """Bytes of the body before those that were asked for."""
        size = repository.files[name].size
        wanted = self.start + self.done
        if response.status_code == 206:
            content = re.match(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", "")
            )
            if content is None or int(content[1]) != wanted:
                raise Network(f"another range than asked for, of {repository.id}/{name}")
            whole, skip = content[2], 0
        else:
            whole, skip = response.headers.get("content-length", "*"), wanted
        if whole != "*" and int(whole) != size:
            raise CorruptFile(
                "not of the size that the Hub's tree says",
                file=f"{repository.id}/{name}",
                expected=f"{size:,} bytes",
                got=f"{int(whole):,}",
            )
        if skip > _MOST_SKIPPED:
            raise Network(
                f"{_origin(str(response.url))} serves no parts of files",
                hint="without --stream, files are downloaded whole",
            )
        return skip


class _Refused(Exception):
    """An answer that may be another when the request is repeated."""

    def __init__(self, why: Exception, headers: Mapping[str, str]) -> None:
        self.why, self.headers = why, headers


def _refusal(response: Any, repository: Repository, name: str, at_hub: bool) -> Exception:
    """What to raise for an answer that is no success: the end, or a `_Refused`."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    status = response.status_code
    if status == 416:
        return CorruptFile(
            "ends before the size that the Hub's tree says", file=f"{repository.id}/{name}"
        )
    if at_hub:
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as e:
            why: Exception = failures.translated(e, repository.id, repository.commit)
            why.__cause__ = e
    else:
        why = Network(f"the storage of the Hub answers {status} for {repository.id}/{name}")
    if status in failures.PASSING or not at_hub:  # there a signed URL may just have expired
        return _Refused(why, response.headers)
    return why


def _target(url: str, location: str) -> str:
    """Where a redirect leads; raises Network where that is no address."""
    invalid = failures.httpx().InvalidURL
    try:
        target = urljoin(url, location)
        failures.httpx().URL(target)
        _origin(target)
    except (ValueError, invalid):
        raise Network(f"the Hub leads to no address: {printable(location)}") from None
    return target


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port
