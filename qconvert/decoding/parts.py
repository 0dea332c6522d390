"""Reading what the files hold of an encoded tensor.

A range of a decoded tensor needs the same range of its codes and a few scales, again and again the
same ones. Small parts are therefore read whole, and each thread keeps the last few: on the Hub, a
read is a round trip.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import local

from qconvert import arrays
from qconvert.errors import CorruptFile
from qconvert.lazy import np
from qconvert.types import Array, ReadStored, TensorInfo

_SMALL_BYTES = 1 << 20
KEPT_BYTES = 4 << 20
"""Most bytes of parts that a thread keeps, beside the last one it has read."""


class _Recent(local):
    """What a thread has read last."""

    def __init__(self) -> None:
        self.held: OrderedDict[Hashable, Array] = OrderedDict()


_recent = _Recent()


def kept(key: Hashable, make: Callable[[], Array]) -> Array:
    """What `make` returns, or returned when this thread last asked for `key`, if it is kept.

    The key names a reader: another one may be given other bytes.
    """
    held = _recent.held
    found = held.pop(key, None)
    if found is None:
        while held and sum(array.nbytes for array in held.values()) > KEPT_BYTES:
            held.popitem(last=False)
        found = make()
        found.setflags(write=False)
    held[key] = found
    return found


def read(read_stored: ReadStored, part: TensorInfo, start: int, stop: int) -> Array:
    """The elements [start, stop) of a flattened part, as their bits; not to be written to."""
    if part.nbytes <= _SMALL_BYTES:
        return read_kept(read_stored, part, 0, part.numel)[start:stop]
    return _read(read_stored, part, start, stop)


def read_kept(read_stored: ReadStored, part: TensorInfo, start: int, stop: int) -> Array:
    """The same, where the next read by this thread is likely to want the same elements."""
    return kept(
        (read_stored, part.file, part.start, start, stop),
        lambda: _read(read_stored, part, start, stop),
    )


def read_floats(read_stored: ReadStored, part: TensorInfo, start: int, stop: int) -> Array:
    """Scales, or zeros, as float32. Raises CorruptFile where one is NaN or Inf."""
    bits = read(read_stored, part, start, stop)
    if part.dtype in ("F8_E8M0", "U8"):
        floats = np.ldexp(np.float32(1), bits.astype(np.int32) - 127)
        floats[bits == 255] = np.nan
    else:
        floats = arrays.to_float32(bits, part.dtype)
    if not np.isfinite(floats).all():
        bad = start + int(np.flatnonzero(~np.isfinite(floats))[0])
        raise CorruptFile(
            f"element {bad:,} is not a finite number", file=part.file, tensor=part.name
        )
    return floats


def _read(read_stored: ReadStored, part: TensorInfo, start: int, stop: int) -> Array:
    array = np.empty(stop - start, arrays.storage_dtype(part.dtype))
    read_stored(part, start, stop, array)
    return array
