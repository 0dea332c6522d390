"""One call of huggingface_hub: with a timeout, retried where that is safe, its errors translated.

The library retries some calls for half a minute and others not at all, and sets no timeout on most
of them. A call made through here ends: every request has a timeout, failures that may pass (429,
5xx, a broken connection) are tried again a bounded number of times, and what is left is one of our
errors, with a hint to paste. The token is looked at before it is sent: one that no header can
carry would be quoted by the exception that says so.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from threading import Event, Lock
from typing import Any, TypeVar

from qconvert.hub import failures
from qconvert.version import __version__

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
"""Longest silence of the server. It may work on a commit of many files for most of that."""
FIRST_WAIT = 0.5
"""Seconds before a request is repeated; twice as long each further time, up to half a minute."""
MAX_WAIT = 300.0
"""Seconds; a server that asks for more patience is reported instead."""

T = TypeVar("T")


def call(
    fn: Callable[[], T],
    repo_id: str,
    revision: str | None = None,
    *,
    write: bool = False,
    retries: int = 3,
) -> T:
    """What `fn`, a call of huggingface_hub about `repo_id`, returns.

    `retries` bounds the repetitions; 0 is for calls that must not be made twice, or that the
    library repeats itself. `write` words the refusals. Raises NotFound, Gated, NotLoggedIn,
    Forbidden, RevisionMoved, Network, DiskFull, NotWritable, or HubError for what else the Hub
    says; the library's exception is the cause.
    """
    from huggingface_hub import errors

    prepare()
    backoff = Backoff(retries)
    expected = (
        OSError, UnicodeError, RuntimeError, json.JSONDecodeError, errors.HFValidationError,
        failures.httpx().HTTPError, failures.httpx().InvalidURL,
    )  # fmt: skip
    while True:
        try:
            request_headers()
            return fn()
        except expected as e:
            if isinstance(e, RuntimeError) and not failures.of_library(e):
                raise
            again = failures.may_pass(e) and backoff.wait(
                failures.headers_of(e), connected=failures.connected(e)
            )
            if not again:
                raise failures.translated(e, repo_id, revision, write=write) from e


def prepare() -> None:
    """Makes huggingface_hub fit to be called: timeouts, and silence on our screen."""
    with _preparing:
        _prepare()


_preparing = Lock()


@cache
def _prepare() -> Callable[[], Any]:
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils.tqdm import disable_progress_bars

    warnings.filterwarnings("ignore", module="huggingface_hub")  # our errors say it
    hooks = get_session().event_hooks  # the library's own: offline mode, request ids, debug log

    def session() -> Any:
        return failures.httpx().Client(
            event_hooks=hooks, follow_redirects=True, timeout=timeout(ANSWER_SECONDS)
        )

    set_client_factory(session)
    disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return session


def new_session() -> Any:
    """An HTTP session like the library's own, for its caller to close."""
    with _preparing:
        return _prepare()()


def timeout(silence: float) -> Any:
    """Seconds without a byte, and 10 s to connect; for a free connection one waits as long as
    that takes."""
    return failures.httpx().Timeout(silence, connect=CONNECT_SECONDS, pool=None)


def request_headers() -> dict[str, str]:
    """What to send to the Hub, and to nobody else: the token is among it, if there is one.

    Raises NotLoggedIn for a token that cannot be sent.
    """
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="qconvert", library_version=__version__)
    token = headers.get("authorization", "")
    if not (token.isascii() and token.isprintable()):
        raise failures.no_usable_token()
    return headers


# ── patience ─────────────────────────────────────────────────────────────────────────────────


class Backoff:
    """Waits before a request is repeated: longer each time, or as long as the server asks."""

    def __init__(self, retries: int, stop: Event | None = None) -> None:
        self._retries = retries
        self._stop = stop
        self._tried = 0

    def reset(self) -> None:
        """Things go well again."""
        self._tried = 0

    def wait(self, headers: Mapping[str, str], *, connected: bool = True) -> bool:
        """Sleeps, then says True; False, at once, when there is no point in trying again.

        `headers` are those of the answer, if there was one. Where not even a connection was made
        there is one more attempt: a laptop without a network should learn so within a second.
        """
        retries = self._retries if connected else min(1, self._retries)
        seconds = asked_to_wait(headers)
        if self._tried >= retries or (seconds or 0) > MAX_WAIT:
            return False
        if seconds is None:
            seconds = min(FIRST_WAIT * 2**self._tried, 30)
        self._tried += 1
        if self._stop is None:
            time.sleep(seconds)
            return True
        return not self._stop.wait(seconds)


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, by `RateLimit: "api";r=0;t=55` or `Retry-After`."""
    if limit := re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", "")):
        return float(limit[1]) + 1
    after = headers.get("retry-after", "").strip()
    if after.isdecimal() and after.isascii():
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        return None
