"""Names that come from a checkpoint, turned into paths that stay inside it.

`Path("/model") / "/etc/passwd"` is `/etc/passwd`, an index may name `../secret`, and a downloaded
folder may hold a link to anywhere. So a name must look harmless, and where it really leads must
lie in the checkpoint's folder. One exception: the cache of huggingface_hub keeps a repository's
files as `snapshots/<commit>/<name>` → `blobs/<hash>`, and that link is followed within the same
repository.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from qconvert.errors import CorruptFile, NotFound, UnsafePath

_NAME = re.compile(r"(?:[A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_][\w. -]*", re.ASCII)
_MAX_NAME = 255


def regular_file(root: Path, name: str) -> Path:
    """The real path, links resolved, of the regular file `name` (at most one subfolder deep).

    Raises UnsafePath when the name is suspicious, leads out of `root`, or is a folder, FIFO or
    device; NotFound when there is no such file or the link dangles.
    """
    if len(name) > _MAX_NAME or ".." in name or not _NAME.fullmatch(name):
        raise UnsafePath("not a plain file name", file=name)
    return file_inside(root, name)


def file_inside(root: Path, name: str) -> Path:
    """`regular_file` for a name that comes from listing `root` and may be spelled in any way."""
    root = root.resolve()
    real = Path(os.path.realpath(root / name))
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise UnsafePath(f"leads out of the folder, to {real}", file=name)
    try:
        mode = real.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:
        raise NotFound("no such file", file=name) from None
    except OSError as e:
        raise UnsafePath(f"cannot be followed ({e.strerror})", file=name) from None
    if not stat.S_ISREG(mode):
        raise UnsafePath("not a regular file", file=name)
    return real


def open_regular(path: Path, name: str) -> int:
    """A read-only descriptor of a regular file; anything else is refused without blocking.

    Raises UnsafePath for a link, folder, FIFO, socket or device, NotFound, CorruptFile.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # a device may act on being opened
            raise UnsafePath("not a regular file", file=name)
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise NotFound("no such file", file=name) from None
    except OSError as e:
        raise CorruptFile(f"cannot be read ({e.strerror})", file=name) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafePath("not a regular file", file=name)
    return fd


def read_bytes(root: Path, name: str, max_bytes: int) -> bytes:
    """The content of a small regular file: never more than `max_bytes` + 1 bytes of it."""
    with open(open_regular(regular_file(root, name), name), "rb") as file:
        return file.read(max_bytes + 1)
