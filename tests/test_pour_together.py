"""Several plans poured side by side: the bytes of each alone, and every tensor read once."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import pytest

from qconvert.conversion import Request, convert
from qconvert.conversion import plan as make_plan
from qconvert.errors import NonFinite
from qconvert.pour import Order, Poured, pour_together
from qconvert.source import SourceReader
from qconvert.staging import Staging
from qconvert.types import Array, Checkpoint, Plan, TensorInfo
from tests.hub.runs import weights
from tests.models import tiny

SHARD = 34_000
FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "hqq4": ("hqq", {"bits": 4}),
    "hqq3": ("hqq", {"bits": 3}),
}


class Counting(SourceReader):
    """Counts what is read and released; ends at one tensor, or finds 1e5 in another."""

    def __init__(self, checkpoint: Checkpoint, stop_at: str = "", large: str = "") -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint
        self.elements: Counter[str] = Counter()
        self.released: list[str] = []
        self._stop_at, self._large = stop_at, large
        self._count = Lock()

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        if tensor.name == self._stop_at:
            raise KeyboardInterrupt
        with self._count:
            self.elements[tensor.name] += stop_element - start_element
        super().read(tensor, start_element, stop_element, out)
        if tensor.name == self._large:
            view = memoryview(out).cast("B")  # type: ignore[arg-type]
            view[:2] = b"\xc3\x47"  # 99,840 in BF16

    def release(self, tensor: TensorInfo) -> None:
        self.released.append(tensor.name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The weight files of each format, made by itself."""
    made = {}
    for name, (verb, options) in FORMATS.items():
        out = tmp_path_factory.mktemp("alone") / name
        convert(
            Request(
                str(model), verb, options, output=out, max_shard_bytes=SHARD, validate=False
            )
        )  # fmt: skip
        made[name] = weights(out)
    return made


@pytest.fixture
def plans(model: Path) -> dict[str, Plan]:
    return {
        name: make_plan(Request(str(model), verb, options, max_shard_bytes=SHARD))
        for name, (verb, options) in FORMATS.items()
    }


def pour(plans: dict[str, Plan], folder: Path, reader: Counting) -> list[Poured | NonFinite]:
    """One run, into staging trees in `folder` that a later run finds again.

    The reader passes for a stream, all of which has arrived as promised.
    """
    with ExitStack() as stack:
        orders = [
            Order(plan, stack.enter_context(Staging(folder / name, plan.fingerprint).open()))
            for name, plan in plans.items()
        ]
        try:
            return pour_together(orders, threads=3, source=lambda _: reader)
        finally:
            for order in orders:
                for file in reader.checkpoint.files:
                    order.staging.record(source=file, sha256="")


def made(plans: dict[str, Plan], folder: Path) -> dict[str, dict[str, str]]:
    return {name: weights(Staging(folder / name, p.fingerprint).tree) for name, p in plans.items()}


def test_every_element_is_read_once_and_every_format_is_as_alone(
    plans: dict[str, Plan], alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    source = next(iter(plans.values())).checkpoint
    reader = Counting(source)
    found = pour(plans, tmp_path, reader)
    assert all(isinstance(outcome, Poured) for outcome in found)
    assert made(plans, tmp_path) == alone
    tensors = source.tensors.values()
    assert reader.elements == {tensor.name: tensor.numel for tensor in tensors}
    assert sorted(reader.released) == sorted(source.tensors)


def test_what_one_format_has_already_is_made_for_the_others_alone(
    plans: dict[str, Plan], alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    source = next(iter(plans.values())).checkpoint
    first = {name: plan for name, plan in plans.items() if name == "nf4"}
    pour(first, tmp_path, Counting(source))
    found = pour(plans, tmp_path, Counting(source))
    assert made(plans, tmp_path) == alone
    resumed = [outcome.resumed_bytes for outcome in found if isinstance(outcome, Poured)]
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    assert resumed == [total if name == "nf4" else 0 for name in plans]


def test_an_interruption_leaves_every_format_to_be_gone_on_with(
    plans: dict[str, Plan], alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    source = next(iter(plans.values())).checkpoint
    with pytest.raises(KeyboardInterrupt):
        pour(plans, tmp_path, Counting(source, stop_at="model.layers.1.mlp.down_proj.weight"))
    found = pour(plans, tmp_path, Counting(source))
    assert made(plans, tmp_path) == alone
    assert all(isinstance(o, Poured) and o.resumed_bytes > 0 for o in found)


def test_what_one_format_cannot_hold_does_not_stop_the_others(
    plans: dict[str, Plan], alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """1e5 is beyond float16, which LLM.int8 goes through."""
    broken = "model.layers.0.mlp.up_proj.weight"
    source = next(iter(plans.values())).checkpoint
    found = dict(zip(plans, pour(plans, tmp_path, Counting(source, large=broken)), strict=True))
    assert isinstance(found["int8"], NonFinite)
    assert broken in str(found["int8"])
    assert all(isinstance(found[name], Poured) for name in plans if name != "int8")
    assert made(plans, tmp_path)["nf4"].keys() == alone["nf4"].keys()
