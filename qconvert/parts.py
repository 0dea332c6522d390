"""One conversion by several processes, which see the same storage or write to the same branch.

A plan says of each shard which bytes it holds, and from which tensors they come; so shards can be
poured anywhere. Each process plans for itself, takes the share that its number gives it, and pours
it into a part of the staging folder (`staging.py`), comparing every tensor with its source. What
is made of the parts is the work of an ordinary conversion: it finds them, believes of them what
their bytes confirm, pours what is missing, proves and commits. So its result is that of a
conversion alone, whatever became of the parts.

From Hub to Hub the shards of all parts gather on one branch, which is their journal.
"""

from __future__ import annotations

import contextlib

from qconvert import conversion, devices, registry, stages
from qconvert.errors import UsageError
from qconvert.request import Request, worker_count
from qconvert.types import Plan, Progress, Shard


def refusal(request: Request) -> str:
    """Why a request cannot be done in parts; "" if it can."""
    if registry.info(request.method).calibrated:
        return f"{request.method} reads every block several times"
    if request.restart:
        return "what was made would be thrown away again"
    return ""


def share(planned: Plan, part: int, of: int) -> list[Shard]:
    """The shards that the `part`-th of `of` processes pours, 0 ≤ part < of.

    Neighbours stay together, since one file of the source feeds them; each share has about as many
    bytes as the others.
    """
    total = planned.weight_bytes
    chosen: list[Shard] = []
    before = 0
    for shard in planned.shards:
        middle = 2 * before + shard.size
        if of * middle // (2 * total) == part:
            chosen.append(shard)
        before += shard.size
    return chosen


def pour_part(request: Request, part: int, of: int, *, progress: Progress | None = None) -> None:
    """Pours a share of a conversion.

    To be followed by `conversion.convert` of the same request, when all parts have ended. After an
    interruption the same call goes on. Raises UsageError for what cannot be done in parts, Locked
    where the same part is at work, and what `convert` raises of source and disk.

    Peak memory: that of `convert` while it pours.
    """
    if why := refusal(request):
        raise UsageError(f"this conversion cannot be done in parts: {why}")
    planned = conversion.plan(request)
    work = stages.begin(request, planned)
    whole = work.staged
    names = [shard.name for shard in share(planned, part, of)]
    wanted = [name for name in names if not (whole.tree / name).exists()]
    if not wanted or stages.is_there(work):
        return
    if not request.hub_to_hub:
        stages.check_destination(work)
    stages.check_space([work])
    if not request.stream:
        work.planned = stages.fetched(planned, progress)
    work.staged = whole.part(f"{part + 1}-of-{of}")
    with work.staged.open():
        work.sink = stages.sink_of(work, progress, shared=True)
        found, threads = devices.find(request.device), worker_count(request.threads)
        stages.pour_some(work, wanted, found, threads, progress)
        if work.sink is not None:  # nothing of it is here any more
            work.staged.discard()
    if work.sink is not None:
        with contextlib.suppress(OSError):  # that of other parts on this machine is not empty
            whole.parts.rmdir()
            whole.root.rmdir()
