"""What pouring believes of an earlier run, and that it ends, whatever its reader does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qconvert.conversion import Request, convert
from qconvert.conversion import plan as make_plan
from qconvert.errors import CorruptFile, Network
from qconvert.leftovers import Sealed
from qconvert.outputs import shards_at_once
from qconvert.pour import pour
from qconvert.source import Reader, SourceReader
from qconvert.staging import Staging
from qconvert.types import JSON, Array, Plan, PlanEntry, Shard, TensorInfo
from tests.hub.runs import weights
from tests.models import tiny

SHARD = 34_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that end elsewhere than those of the result."""
    return tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("e") / "out"
    convert(
        Request(
            str(model), "hqq", {"bits": 4}, output=out, max_shard_bytes=SHARD, validate=False
        )
    )  # fmt: skip
    return weights(out)


@pytest.fixture
def plan(model: Path) -> Plan:
    return make_plan(Request(str(model), "hqq", {"bits": 4}, max_shard_bytes=SHARD))


class Bad(SourceReader):
    """A transfer in which one tensor is broken; that shows at the end of its file."""

    def __init__(self, plan: Plan, broken: str, put: int) -> None:
        super().__init__(plan.checkpoint)
        self._broken, self._put = plan.checkpoint.tensors[broken], put

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        super().read(tensor, start_element, stop_element, out)
        if tensor == self._broken:
            view = memoryview(out).cast("B")  # type: ignore[arg-type]
            view[-2:] = self._put.to_bytes(2, "little")

    def check(self, file: str) -> None:
        if file == self._broken.file:
            raise CorruptFile("not what was promised", file=file)


class Cut(SourceReader):
    """A transfer that is whole, and verified, while the work on one tensor has not begun."""

    def __init__(self, plan: Plan, staging: Staging, waiting: str) -> None:
        super().__init__(plan.checkpoint)
        self._waiting = plan.checkpoint.tensors[waiting]
        staging.record(source=self._waiting.file, sha256="")

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        if tensor == self._waiting:
            raise KeyboardInterrupt
        super().read(tensor, start_element, stop_element, out)


BROKEN = "model.layers.1.mlp.down_proj.weight"


def test_what_was_made_of_broken_bytes_is_never_believed(
    plan: Plan, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Nor if the file comes again, whole, and all ends before the tensor is made anew."""
    staging = Staging(tmp_path / "out", plan.fingerprint)

    def once(reader: Callable[[], SourceReader]) -> None:
        with staging.open():
            pour(plan, staging, threads=2, source=lambda _: reader())

    with pytest.raises(CorruptFile, match="promised"):
        once(lambda: Bad(plan, BROKEN, 0x3F80))
    assert any(r.get("tensor") == BROKEN for r in staging.records)
    with pytest.raises(KeyboardInterrupt):
        once(lambda: Cut(plan, staging, BROKEN))
    once(lambda: SourceReader(plan.checkpoint))
    assert weights(staging.tree) == expected


def test_infinity_in_broken_bytes_is_no_fault_of_the_model(model: Path, tmp_path: Path) -> None:
    plan = make_plan(Request(str(model), "hqq", {"bits": 4}))
    assert len(plan.shards) == 1
    infinity = 0x7F80
    staging = Staging(tmp_path / "out", plan.fingerprint)
    with staging.open(), pytest.raises(CorruptFile, match="promised"):
        pour(plan, staging, threads=2, source=lambda _: Bad(plan, BROKEN, infinity))


PATIENCE = 20.0


class Streamed(SourceReader):
    """A stream without a window: a file ends when its last tensor is released."""

    def __init__(self, plan: Plan, files: Sequence[str]) -> None:
        super().__init__(plan.checkpoint)
        self._left = {
            file: {t.name for t in plan.checkpoint.tensors.values() if t.file == file}
            for file in files
        }
        self._changed = threading.Condition()
        self._ended = False

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        super().close()

    def release(self, tensor: TensorInfo) -> None:
        with self._changed:
            self._left[tensor.file].discard(tensor.name)
            self._changed.notify_all()

    def check(self, file: str) -> None:
        with self._changed:
            over = self._changed.wait_for(lambda: self._ended or not self._left[file], PATIENCE)
            if self._ended or not over:
                raise CorruptFile("never comes to its end", file=file)


@dataclass
class Away:
    """A sink that takes whatever it gets."""

    most_on_disk: int
    done: dict[str, Sealed]

    refuses: str = ""

    def take(self, shard: Shard, path: Path, sealed: Sealed) -> None:
        if shard.name == self.refuses:
            raise Network("no way there")
        self.done[shard.name] = sealed


def test_shards_that_are_full_out_of_turn_do_not_block_each_other(
    model: Path, tmp_path: Path
) -> None:
    """A tensor may take longer than the whole of the next shard, whose source goes on and on."""
    plan = make_plan(Request(str(model), "int8", max_shard_bytes=9_000))
    feeding = [{plan.entries[i].tensor.file for i in shard.entries} for shard in plan.shards]
    awaited: dict[str, int] = {
        plan.entries[shard.entries[-1]].tensor.name: number + 1
        for number, shard in enumerate(plan.shards[:-1])
        if len(feeding[number]) == 1 < len(feeding[number + 1])
    }
    assert len(awaited) > 1
    assert shards_at_once(plan, 1) < len(plan.shards) // 2
    left = [{plan.entries[i].tensor.name for i in shard.entries} for shard in plan.shards]

    def prove(entry: PlanEntry, source: Reader, result: Reader) -> JSON:
        name = entry.tensor.name
        end = time.monotonic() + 5
        while name in awaited and left[awaited[name]] and time.monotonic() < end:
            time.sleep(0.05)
        for names in left:
            names.discard(name)
        return {}

    staging = Staging(tmp_path / "out", plan.fingerprint)
    sink = Away(1, {})
    with staging.open():
        pour(
            plan, staging, threads=4, source=lambda files: Streamed(plan, files), prove=prove,
            sink=sink,
        )  # fmt: skip
    assert list(sink.done) == [shard.name for shard in plan.shards]


def test_a_shard_that_cannot_be_sent_ends_it_all(model: Path, tmp_path: Path) -> None:
    """Though the next ones wait for source files that nobody goes on with."""
    plan = make_plan(Request(str(model), "int8", max_shard_bytes=9_000))
    staging = Staging(tmp_path / "out", plan.fingerprint)
    sink = Away(1, {}, refuses=plan.shards[1].name)
    began = time.monotonic()
    with staging.open(), pytest.raises(Network):
        pour(plan, staging, threads=2, source=lambda files: Streamed(plan, files), sink=sink)
    assert list(sink.done) == [plan.shards[0].name]
    assert time.monotonic() - began < PATIENCE / 2
