"""One reader for several plans of the same checkpoint: every tensor is read and decoded once.

The plans are poured side by side, tensor by tensor, so that what one has read another wants soon.
A tensor is kept, in pieces that are each read by whoever comes first, until the last of the plans
has released it. That takes the memory of the largest tensor (twice, while workers are between two
of them), and spares what is dear: the disk, a download, the decoding of a quantized source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

from qconvert import arrays
from qconvert.lazy import np
from qconvert.source import Closeable, span
from qconvert.types import ITEMSIZE, Array, TensorInfo

_PIECE_ELEMENTS = 1 << 22


@dataclass(slots=True, eq=False)
class _Kept:
    """A tensor in memory, as far as anybody wanted it."""

    bits: Array
    there: list[bool]
    locks: list[Lock]


@dataclass(slots=True)
class Shared:
    """A `source.Reader` for `users` plans, each of which releases every tensor."""

    reader: Closeable
    users: int
    _kept: dict[str, _Kept] = field(default_factory=dict)
    _releases: dict[str, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        _, view = span(tensor, start_element, stop_element, out)
        if not view.nbytes:
            return
        kept = self._tensor(tensor)
        for index in range(start_element // _PIECE_ELEMENTS, -(-stop_element // _PIECE_ELEMENTS)):
            self._fetch(tensor, kept, index)
        itemsize = ITEMSIZE[tensor.dtype]
        view[:] = kept.bits.view(np.uint8).data[start_element * itemsize : stop_element * itemsize]

    def read_stored(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        self.reader.read_stored(tensor, start_element, stop_element, out)

    def check(self, file: str) -> None:
        self.reader.check(file)

    def release(self, tensor: TensorInfo) -> None:
        with self._lock:
            count = self._releases[tensor.name] = self._releases.get(tensor.name, 0) + 1
            if count < self.users:
                return
            self._kept.pop(tensor.name, None)
        self.reader.release(tensor)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, tensor: TensorInfo) -> _Kept:
        with self._lock:
            if tensor.name not in self._kept:
                pieces = -(-tensor.numel // _PIECE_ELEMENTS)
                self._kept[tensor.name] = _Kept(
                    np.empty(tensor.numel, arrays.storage_dtype(tensor.dtype)),
                    [False] * pieces,
                    [Lock() for _ in range(pieces)],
                )
            return self._kept[tensor.name]

    def _fetch(self, tensor: TensorInfo, kept: _Kept, index: int) -> None:
        with kept.locks[index]:
            if not kept.there[index]:
                start = index * _PIECE_ELEMENTS
                stop = min(start + _PIECE_ELEMENTS, tensor.numel)
                self.reader.read(tensor, start, stop, kept.bits[start:stop])
                kept.there[index] = True
