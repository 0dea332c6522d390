"""Every error a user can meet, in one file.

    QConvertError
    ├ UsageError 2        unknown method, bad group size, output inside the source · InvalidJobs
    ├ SourceError 3       NotFound · Gated · CorruptFile · IndexMismatch · MissingShard · UnsafePath
    │                     UnsafeFormat · NonFinite · UnsupportedConfig · RemoteCode
    ├ OutputError 4       Exists · Locked · DiskFull · NotWritable · StaleStaging
    ├ ResourceError 5     OutOfMemory · DeviceMissing · DependencyMissing
    ├ ValidationError 6   ContractViolation · NumericMismatch · ReloadFailed
    └ HubError 7          NotLoggedIn · Forbidden · RevisionMoved · PushIncomplete · Network
    Interrupted 130 (SIGINT) / 143 (SIGTERM); a bug exits with 70

The number is the process's exit code. A message names the file and the tensor, what was expected
and what was found; `hint` is something to paste. Text that comes from a checkpoint is escaped
here, once, so that a hostile tensor name can neither move the cursor nor fill the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

_MAX_QUOTED = 200


def printable(text: object, most: int = _MAX_QUOTED) -> str:
    """`text` on one line, without control or bidi characters, at most `most` characters long."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return escaped if len(escaped) <= most else escaped[: most - 1] + "…"


class QConvertError(Exception):
    """Base of all errors that are somebody's mistake or misfortune, never a bug of ours."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        expected: object = None,
        got: object = None,
        hint: str = "",
    ) -> None:
        message = what
        if file is not None:
            message += f" in {printable(file)}"
        if tensor is not None:
            message += f", tensor {printable(tensor)}"
        if expected is not None:
            message += f": expected {printable(expected)}, got {printable(got)}"
        super().__init__(message)
        self.hint = hint


class UsageError(QConvertError):
    exit_code = 2


class InvalidJobs(UsageError):
    """A batch file with mistakes; `problems` has every one of them, (line, what), in order."""

    _MOST = 50

    def __init__(self, file: str, problems: Sequence[tuple[int, str]]) -> None:
        shown = [f"{printable(file)}:{line}: {what}" for line, what in problems[: self._MOST]]
        if len(problems) > self._MOST:
            shown.append(f"and {len(problems) - self._MOST} more")
        first = f"{len(problems)} mistakes in {printable(file)}\n\n" if len(problems) > 1 else ""
        super().__init__(first + "\n".join(shown))
        self.problems = tuple(problems)


class SourceError(QConvertError):
    exit_code = 3


class NotFound(SourceError):
    """No such folder, repository or revision."""


class Gated(SourceError):
    """The repository asks for a licence to be accepted or for a token."""


class CorruptFile(SourceError):
    """A file that is not what its format says: truncated, overlapping, not JSON, changing."""


class IndexMismatch(SourceError):
    """The index and the shards' headers disagree."""


class MissingShard(SourceError):
    """The index names a file that is not there."""


class UnsafePath(SourceError):
    """A path that leaves the checkpoint's folder, or is not a regular file."""


class UnsafeFormat(SourceError):
    """Pickled weights: reading them would run whatever code they contain."""


class NonFinite(SourceError):
    """NaN or Inf in a weight, or made by a cast to a narrower dtype."""

    count: int = 0
    """How many of them the block holds."""
    first: int = 0
    """Flat index of the first, within the block."""


class UnsupportedConfig(SourceError):
    """A config.json that no model can be built from."""


class RemoteCode(SourceError):
    """The model needs Python code that is shipped beside its weights."""


class OutputError(QConvertError):
    exit_code = 4


class Exists(OutputError):
    """The destination is already there."""


class Locked(OutputError):
    """Another process is converting to the same destination."""


class DiskFull(OutputError):
    """Less space than the plan needs."""


class NotWritable(OutputError):
    """Read-only, no permission, or no such parent folder."""


class StaleStaging(OutputError):
    """An unfinished conversion of another source, options or version is in the way."""


class ResourceError(QConvertError):
    exit_code = 5


class OutOfMemory(ResourceError):
    """The device has less memory than one unit of work needs."""


class DeviceMissing(ResourceError):
    """The device asked for is not in this machine."""


class DependencyMissing(ResourceError):
    """A library that the verb needs is not installed, or too old."""


class ValidationError(QConvertError):
    exit_code = 6


class ContractViolation(ValidationError):
    """Names, dtypes, shapes, values or hashes are not what formats/<name> says."""


class NumericMismatch(ValidationError):
    """A tensor's error lies outside the band expected of its method and bits."""


class ReloadFailed(ValidationError):
    """The loader refused, built the wrong layers, or its logits are off."""


class HubError(QConvertError):
    exit_code = 7


class NotLoggedIn(HubError):
    """No token, or one the Hub does not know."""


class Forbidden(HubError):
    """The token may not do this."""


class RevisionMoved(HubError):
    """Somebody else committed in the meantime."""


class PushIncomplete(HubError):
    """The remote tree is not what was sent."""


class Network(HubError):
    """The Hub could not be reached, or kept failing."""


class Interrupted(QConvertError):
    """SIGINT, SIGTERM or SIGHUP; everything finished so far stays in the staging folder."""

    exit_code = 130

    def __init__(self, signal_number: int, *, hint: str = "") -> None:
        super().__init__("interrupted", hint=hint)
        self.code = 128 + signal_number
