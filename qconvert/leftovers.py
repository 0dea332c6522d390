"""What an earlier run left of a conversion, as far as it can be believed.

The journal is a hint. A sealed shard counts if its bytes still have the journalled hash, a tensor
if those at its planned place have the journalled checksum. One that came from a stream counts only
if the journal also says that its source file arrived, that very time, with the hash that the Hub
promised, since a stream is checked when it ends; none counts that was made of a file before that
was found to be broken; and where tensors are proved while they are poured, only with its proof.
Whatever a sink has is finished.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qconvert.digest import sha256
from qconvert.staging import Staging
from qconvert.tiles import global_name, written_ranges
from qconvert.types import JSON, Plan, PlanEntry, Shard


@dataclass(frozen=True, slots=True)
class Sealed:
    """A finished shard: what its bytes are, and what was proved of the tensors in it."""

    size: int
    sha256: str
    proofs: Mapping[str, JSON] = field(default_factory=dict)
    """By the name of the source tensor; empty unless a `Prove` was at work."""


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What does not have to be done again."""

    sealed: Mapping[str, Sealed]
    """By name of the shard."""
    poured: Mapping[str, JSON | None]
    """By name of a source tensor of a shard that is not sealed: what was proved of it."""

    def files(self, plan: Plan) -> list[str]:
        """The source files that have to be read, in the plan's order."""
        wanted: dict[str, None] = {}
        for shard in plan.shards:
            if shard.name not in self.sealed:
                for tensor in (plan.entries[index].tensor for index in shard.entries):
                    if tensor.name not in self.poured:
                        parts = plan.checkpoint.parts(tensor)
                        wanted |= dict.fromkeys(part.file for part in parts)
        return list(wanted)


def survey(plan: Plan, staging: Staging, done: Mapping[str, Sealed], *, proved: bool) -> Leftovers:
    """Looks at what is in the staging tree; `done` are the shards that a sink has."""
    records = staging.records
    believed = _believed(plan, records)
    digests = {r["shard"]: r["sha256"] for r in records if "shard" in r}
    sealed: dict[str, Sealed] = {}
    poured: dict[str, JSON | None] = {}
    for shard in plan.shards:
        if shard.name in done:
            sealed[shard.name] = done[shard.name]
            continue
        entries = [plan.entries[index] for index in shard.entries]
        kept = {
            entry.tensor.name: entry
            for entry in entries
            if (record := believed.get(entry.tensor.name)) is not None
            and (not proved or "proof" in record)
        }
        proofs = {name: believed[name].get("proof") for name in kept}
        final = staging.tree / shard.name
        digest = digests.get(shard.name)
        if digest and len(kept) == len(entries) and _is(final, shard.size, digest):
            found = {name: proof for name, proof in proofs.items() if proof is not None}
            sealed[shard.name] = Sealed(shard.size, digest, found)
            continue
        part = final.with_name(f"{final.name}.part")
        for name in _unchanged(part, shard, plan, kept, believed):
            poured[name] = proofs[name]
    return Leftovers(sealed, poured)


def _believed(plan: Plan, records: Sequence[JSON]) -> dict[str, JSON]:
    """The last line of each tensor that was made, as far as is known, of the right bytes.

    A run begins with a line `begin`, which names the files that it streams; `source` says that such
    a file has ended as promised, `broken` that a file is not what it should be.
    """
    files_of = {
        entry.tensor.name: {part.file for part in plan.checkpoint.parts(entry.tensor)}
        for entry in plan.entries
    }
    believed: dict[str, JSON] = {}
    pending: dict[str, JSON] = {}
    waiting: dict[str, set[str]] = {}
    """By file: the pending tensors for which it must still end as promised."""
    verified: set[str] = set()
    broken: set[str] = set()

    def forget(file: str) -> None:
        for name in waiting.pop(file, ()):
            pending.pop(name, None)

    for line in records:
        if "begin" in line:
            broken.clear()
            verified -= set(line["begin"])
            for file in line["begin"]:
                forget(file)
        elif "broken" in line:
            broken.add(line["broken"])
            forget(line["broken"])
        elif "source" in line and _as_promised(plan, line):
            verified.add(line["source"])
            for name in waiting.pop(line["source"], ()):
                if name in pending and files_of[name] <= verified:
                    believed[name] = pending.pop(name)
        elif (name := line.get("tensor", "")) in files_of and not files_of[name] & broken:
            if missing := files_of[name] - verified:
                pending[name] = line
                for file in missing:
                    waiting.setdefault(file, set()).add(name)
            else:
                believed[name] = line
    return believed | {name: line for name, line in pending.items() if not line.get("streamed")}


def _as_promised(plan: Plan, record: JSON) -> bool:
    file = plan.checkpoint.files.get(record["source"])
    return file is not None and file.sha256 in (None, record["sha256"])


def _is(path: Path, size: int, digest: str) -> bool:
    """Whether there is a file of this size and hash."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sha256(fd) == digest
    finally:
        os.close(fd)


def _unchanged(
    part: Path,
    shard: Shard,
    plan: Plan,
    entries: Mapping[str, PlanEntry],
    records: Mapping[str, JSON],
) -> list[str]:
    """The tensors of an unfinished shard whose bytes have their journalled checksum."""
    if not entries or not part.is_file():
        return []
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [
            name
            for name, entry in entries.items()
            if _checksum(fd, entry, shard, plan) == records[name]["checksum"]
        ]
    finally:
        os.close(fd)


def _checksum(fd: int, entry: PlanEntry, shard: Shard, plan: Plan) -> int:
    """What pouring the entry would journal, from the bytes that are at its place."""
    found = 0
    for write in written_ranges(entry, plan.container):
        at = shard.offsets[global_name(entry, write.part)] + write.offset
        found += zlib.crc32(os.pread(fd, write.nbytes, at), at & 0xFFFFFFFF)
    return found
