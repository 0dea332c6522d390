"""Samples of a text: windows of equal length, spread over all of it, the same on every machine.

The text is streamed once and a random part of its passages is kept: each gets a random key, and
those with the smallest keys stay, as many as fit a budget. So every part of the text is as likely
to be seen as any other, and memory does not depend on its length. (With windows from one place
only, the error of one layer on other text was six times that on the calibration text; with
windows from everywhere, a tenth larger.)

A passage that is long enough gives one window at a random place, so that a window is one
document's; shorter documents are strung together, the end-of-text token between them, rather than
rejected as in the reference. Only where that is not enough is the rest of the long ones used too,
until nothing is left: no token is in two windows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from qconvert.calibration.documents import Passage
from qconvert.types import Array

CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer needs for prose: a passage of 8 x seqlen characters fills a window."""
_BATCH = 64

Encode = Callable[[Sequence[Passage]], Iterable[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Kept:
    """A random part of a text, in random order."""

    passages: tuple[Passage, ...]
    documents: int
    """How many documents were looked at."""


def keep(passages: Iterable[Passage], budget: int, look_at: int | None, random: Random) -> Kept:
    """At least `budget` characters of passages chosen at random, or all if there are not as many.

    `look_at` ends the stream after that many characters; None reads all of it.
    """
    heap: list[tuple[float, int, Passage]] = []  # the largest key on top: keys are negated
    held = seen = documents = 0
    for number, passage in enumerate(passages):
        documents += passage.opens
        # random() is the one method whose sequence Python promises never to change
        heapq.heappush(heap, (-random.random(), number, passage))
        held += len(passage.text)
        while held - len(heap[0][2].text) >= budget:
            held -= len(heapq.heappop(heap)[2].text)
        seen += len(passage.text)
        if look_at is not None and seen >= look_at:
            break
    return Kept(tuple(passage for _, _, passage in sorted(heap, reverse=True)), documents)


def windows(
    passages: Sequence[Passage],
    encode: Encode,
    *,
    nsamples: int,
    seqlen: int,
    separator: int | None,
    random: Random,
) -> Array:
    """int32 [≤ nsamples, seqlen]: token ids; fewer rows where the passages do not hold more."""
    found: list[Array] = []
    spare: list[Array] = []
    strung = _Strung(seqlen, separator)
    for ids in _encoded(passages, encode):
        if len(ids) < seqlen:
            found += strung.add(ids)
        else:
            start = int(random.random() * (len(ids) - seqlen + 1))
            found.append(ids[start : start + seqlen])
            spare += [ids[:start], ids[start + seqlen :]]
        if len(found) >= nsamples:
            break
    for ids in spare:
        if len(found) >= nsamples:
            break
        found += strung.add(ids)
    if not found:
        return np.empty((0, seqlen), np.int32)
    return np.stack(found[:nsamples])


def _encoded(passages: Sequence[Passage], encode: Encode) -> Iterator[Array]:
    for start in range(0, len(passages), _BATCH):
        for ids in encode(passages[start : start + _BATCH]):
            yield np.array(ids, np.int32)


class _Strung:
    """Pieces of text one after the other, cut into windows."""

    def __init__(self, seqlen: int, separator: int | None) -> None:
        self._seqlen = seqlen
        self._separator = separator
        self._held = np.empty(0, np.int32)

    def add(self, ids: Array) -> list[Array]:
        """The windows that `ids` completes."""
        if not len(ids):
            return []
        between = [self._separator]
        if not len(self._held) or self._separator in (None, self._held[-1], ids[0]):
            between = []
        self._held = np.concatenate([self._held, np.array(between, np.int32), ids])
        whole = len(self._held) // self._seqlen * self._seqlen
        cut, self._held = self._held[:whole], self._held[whole:]
        return list(cut.reshape(-1, self._seqlen))
