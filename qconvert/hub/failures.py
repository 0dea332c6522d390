"""What an exception of huggingface_hub says, and the error of ours that is made of it.

The library words a refusal in a dozen classes, its HTTP library a failure in as many more, hf_xet
both in a text. What counts is who answered (the Hub itself, or the storage it signs URLs for),
with which status, and whether anybody did: that decides whether a request may be repeated, and
what there is to paste.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

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

PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be another when the request is repeated."""
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})[^)]*\), domain: (\S+)")
"""How hf_xet, whose errors carry no answer, words a refusal, and by whom."""


def httpx() -> Any:
    """The module that huggingface_hub sends its requests by: httpx, or since 2.0 httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]


def of_library(e: RuntimeError) -> bool:
    """Whether it is a word of huggingface_hub, or of hf_xet, which it calls and which has no Python
    frames; not a mistake of whoever is called back."""
    frame = e.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(raised_in).partition(".")[0] == "huggingface_hub"


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


def may_pass(e: Exception) -> bool:
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
            return no_usable_token()
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


def no_usable_token() -> NotLoggedIn:
    return NotLoggedIn("no usable token for the Hub", hint=_login())


def _login() -> str:
    """The command that gives another token; one in the environment would go before it."""
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
    return f"unset {' '.join(names)}; hf auth login" if names else "hf auth login"
