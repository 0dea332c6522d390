"""One call of huggingface_hub: with a timeout, retried where that is safe, its errors translated.

The library retries some calls for half a minute and others not at all, and sets no timeout on most
of them. A call made through here ends: every request has a timeout, failures that may pass (429,
5xx, a broken connection) are tried again a bounded number of times, and what is left is one of our
errors, with a hint to paste. The token is looked at before it is sent: one that no header can
carry would be quoted by the exception that says so.
"""

from __future__ import annotations

import email.utils
import errno
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from threading import Event, Lock
from typing import Any, TypeVar

from qconvert.errors import (
    DiskFull,
    Forbidden,
    Gated,
    HubError,
    Network,
    NotFound,
    NotLoggedIn,
    NotWritable,
    QConvertError,
    RevisionMoved,
    printable,
)
from qconvert.version import __version__

PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be another when the request is repeated."""
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
"""Longest silence of the server. It may work on a commit of many files for most of that."""
FIRST_WAIT = 0.5
"""Seconds before a request is repeated; twice as long each further time, up to half a minute."""
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})[^)]*\), domain: (\S+)")
"""How hf_xet, whose errors carry no answer, words a refusal, and by whom."""
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
        httpx().HTTPError, httpx().InvalidURL,
    )  # fmt: skip
    while True:
        try:
            request_headers()
            return fn()
        except expected as e:
            if isinstance(e, RuntimeError) and not _of_library(e):
                raise
            if not (_may_pass(e) and backoff.wait(headers_of(e), connected=connected(e))):
                raise translated(e, repo_id, revision, write=write) from e


def _of_library(e: RuntimeError) -> bool:
    """Whether it is a word of huggingface_hub, or of hf_xet, which it calls and which has no Python
    frames; not a mistake of whoever is called back."""
    frame = e.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(raised_in).partition(".")[0] == "huggingface_hub"


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
        return httpx().Client(
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
    return httpx().Timeout(silence, connect=CONNECT_SECONDS, pool=None)


def httpx() -> Any:
    """The module that huggingface_hub sends its requests by: httpx, or since 2.0 httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]


def request_headers() -> dict[str, str]:
    """What to send to the Hub, and to nobody else: the token is among it, if there is one.

    Raises NotLoggedIn for a token that cannot be sent.
    """
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="qconvert", library_version=__version__)
    token = headers.get("authorization", "")
    if not (token.isascii() and token.isprintable()):
        raise _no_usable_token()
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


def headers_of(e: Exception) -> Mapping[str, str]:
    """The headers of the answer that made an exception; none where there was no answer."""
    headers: Mapping[str, str] = getattr(getattr(e, "response", None), "headers", {})
    return headers


def status_of(e: BaseException | None) -> int | None:
    """The HTTP status behind an exception of the library, or behind one of ours made of it."""
    if isinstance(e, QConvertError):
        e = e.__cause__
    if type(e) is ConnectionError and (found := _XET_STATUS.search(str(e))):
        return int(found[1]) if found[2].startswith(f"{_endpoint()}/") else None
    return getattr(getattr(e, "response", None), "status_code", None)


def _may_pass(e: Exception) -> bool:
    passing = (httpx().TimeoutException, httpx().NetworkError, httpx().RemoteProtocolError)
    return isinstance(e, passing) or status_of(e) in PASSING or _spoilt(e)


def _spoilt(e: Exception) -> bool:
    """Whether a signed URL was too old, or what was sent by it was spoilt on the way."""
    return status_of(e) in (400, 403) and _of_storage(e)


def connected(e: Exception) -> bool:
    """Whether there was a server at all to fail."""
    return not isinstance(
        e, httpx().ConnectError | httpx().ConnectTimeout | httpx().UnsupportedProtocol
    )


# ── errors ───────────────────────────────────────────────────────────────────────────────────


def translated(
    e: Exception, repo_id: str, revision: str | None = None, *, write: bool = False
) -> QConvertError:
    """Our error for an exception of huggingface_hub or of its HTTP library."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    verb = "write to" if write else "read"
    match e:
        case errors.GatedRepoError():  # a subclass of RepositoryNotFoundError: it comes first
            return Gated(
                f"{repo_id} asks you to accept its licence",
                hint=f"accept it at {page} and run: {_login()}",
            )
        case errors.DisabledRepoError():
            return Forbidden(f"{repo_id} is disabled on the Hub", hint=f"see {page}")
        case errors.RevisionNotFoundError():
            return NotFound(
                f"{repo_id} has no revision {printable(revision)!r}",
                hint=f"see {page}/commits/main, or leave --revision out",
            )
        case errors.RemoteEntryNotFoundError():
            return NotFound(f"{repo_id} has no such file", hint=f"see {page}")
        case errors.RepositoryNotFoundError():
            return NotFound(
                f"no repository {repo_id} on the Hub, or it is private",
                hint=f"if it is private, as somebody who may see it: {_login()}",
            )
        case errors.HFValidationError():
            return NotFound(f"{printable(repo_id)} is neither a folder nor a Hub id")
        case errors.LocalTokenNotFoundError() | UnicodeError():
            return _no_usable_token()
        case errors.OfflineModeIsEnabled():
            return Network(
                f"{repo_id} is not a folder, and HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE, or name a folder",
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFull(
                f"no space left in {constants.HF_HUB_CACHE} to download {repo_id}",
                hint="--stream keeps no source file; or another disk: export HF_HOME=DIR",
            )
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS, filename=str(path)):
            return NotWritable(
                f"cannot write {printable(path)} ({e.strerror})",
                hint="a folder for the Hub's cache that can be written: export HF_HOME=DIR",
            )
    said = printable(server_message(e))
    if _of_storage(e) and 400 <= (status_of(e) or 0) < 500:
        return Network(
            f"the storage behind the Hub refuses a request for {repo_id}: {said or status_of(e)}",
            hint="the same command",
        )
    match status_of(e):
        case 401:
            return NotLoggedIn("the Hub does not accept the token", hint=_login())
        case 403:
            return Forbidden(
                f"the token may not {verb} {repo_id}" + (f": {said}" if said else ""),
                hint=f"one that may: {constants.ENDPOINT}/settings/tokens, then {_login()}"
                if write
                else f"see {page}",
            )
        case 412:
            return RevisionMoved(
                f"somebody else has committed to {repo_id} in the meantime",
                hint=f"see {page}/commits/main, then the same command",
            )
        case 429:
            return Network(
                f"the Hub asks for fewer requests, for {repo_id}",
                hint="the same command, in a while"
                + ("" if "authorization" in sent_headers(e) else "; the limit is higher when "
                   "logged in: hf auth login"),
            )  # fmt: skip
        case int(status) if 400 <= status < 500 and status not in PASSING:
            return HubError(f"the Hub refuses to {verb} {repo_id}: {said or f'status {status}'}")
        case int(status):
            reason = f"status {status}"
        case _:
            reason = type(e).__name__
    hint = "the same command, once the connection is back"
    if not connected(e) and "HF_ENDPOINT" in os.environ:
        hint += f"; HF_ENDPOINT is {printable(constants.ENDPOINT)}"
    return Network(f"the Hub could not be reached for {repo_id} ({reason})", hint=hint)


def _of_storage(e: Exception) -> bool:
    """Whether it was not the Hub that answered, but where it keeps large files: by URLs that it
    signs for a while, and without a token."""
    return bool(sent_headers(e)) and "authorization" not in sent_headers(e) and not _asked_hub(e)


def _asked_hub(e: Exception) -> bool:
    url = str(getattr(getattr(e, "response", None), "url", ""))
    return url.startswith(f"{_endpoint()}/")


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def server_message(e: Exception) -> str:
    """What the server said, without the token that a careless proxy repeats in it."""
    said = str(getattr(e, "server_message", None) or "")
    token = sent_headers(e).get("authorization", "").removeprefix("Bearer ")
    return said.replace(token, "…") if token else said


def sent_headers(e: Exception) -> Mapping[str, str]:
    """The headers of the request whose answer made an exception."""
    request = getattr(getattr(e, "response", None), "request", None)
    headers: Mapping[str, str] = getattr(request, "headers", {})
    return headers


def _no_usable_token() -> NotLoggedIn:
    return NotLoggedIn("no usable token for the Hub", hint=_login())


def _login() -> str:
    """The command that gives another token; one in the environment would go before it."""
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
    return f"unset {' '.join(names)}; hf auth login" if names else "hf auth login"
