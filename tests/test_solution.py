"""Finished tensors on disk, and pouring from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qconvert.pour import pour
from qconvert.solution import Solution, is_intact, save
from qconvert.staging import Staging
from qconvert.types import Array, Plan, TensorSpec
from tests.aqlm_cases import plan_aqlm
from tests.models import tiny

SPECS = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "I8", (4,))]
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}


def test_the_library_reads_what_is_saved_and_the_digest_is_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "block.safetensors"
    digest = save(path, SPECS, TENSORS)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(str(path), framework="np") as file:
        for name, array in TENSORS.items():
            assert (file.get_tensor(name) == array).all()
    assert is_intact(path, digest)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert not is_intact(path, digest)
    assert not is_intact(tmp_path / "absent", digest)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": TENSORS["a"]},
        {**TENSORS, "c": TENSORS["b"]},
        {**TENSORS, "a": TENSORS["a"].T},
        {**TENSORS, "a": TENSORS["a"].astype(np.float16)},
        {**TENSORS, "a": TENSORS["a"].view(np.int32)},
    ],
    ids=["missing", "too many", "shape", "size", "dtype"],
)
def test_what_was_not_planned_is_refused(tensors: dict[str, Array], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planned"):
        save(tmp_path / "block.safetensors", SPECS, tensors)
    assert not (tmp_path / "block.safetensors").exists()


def test_a_later_file_overrides_an_earlier_one(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "1.safetensors")
    save_file({"b": TENSORS["b"] + 10}, tmp_path / "2.safetensors")
    with Solution([tmp_path / "1.safetensors", tmp_path / "2.safetensors"]) as solution:
        assert solution.tensors.keys() == TENSORS.keys()
        assert list(solution.whole("b")) == [10, 11, 12, 13]
        assert solution.read("a", 4, 8) == TENSORS["a"].tobytes()[4:12]
        for offset, count in ((0, 5), (-1, 2), (4, 1)):
            with pytest.raises(ValueError, match="not within"):
                solution.read("b", offset, count)


def _invented(plan: Plan) -> tuple[list[TensorSpec], dict[str, Array]]:
    """Random bytes for everything that calibration decides."""
    random = np.random.default_rng(0)
    dtypes = {"I8": np.int8, "I16": np.int16, "F16": np.float16, "BF16": np.uint16}
    specs = [s for e in plan.entries if e.layer or e.action == "tune" for s in e.outputs]
    return specs, {
        spec.name: np.frombuffer(random.bytes(spec.nbytes), dtypes[spec.dtype]).reshape(spec.shape)
        for spec in specs
    }


@pytest.mark.parametrize("scheme", ["2x8g8", "1x12g8"])
def test_pouring_copies_the_solution_whatever_the_tiles(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_aqlm(tiny("qwen2", tmp_path), {"scheme": scheme}, skip="v_proj")
    specs, tensors = _invented(plan)
    assert any(e.action == "tune" for e in plan.entries)
    save(tmp_path / "solution.safetensors", specs, tensors)
    found = []
    for elements, threads in ((1 << 20, 1), (1 << 9, 3)):
        monkeypatch.setattr("qconvert.tiles.TILE_ELEMENTS", elements)
        with (
            Staging(tmp_path / f"out-{elements}", plan.fingerprint).open() as staged,
            Solution([tmp_path / "solution.safetensors"]) as solution,
        ):
            poured = pour(plan, staged, threads=threads, solution=solution)
            path = staged.tree / "model.safetensors"
            found.append(path.read_bytes())
    assert found[0] == found[1]
    path = tmp_path / "poured.safetensors"
    path.write_bytes(found[0])
    with Solution([path]) as written:
        for name, array in tensors.items():
            assert written.whole(name) == array.tobytes()
    (sealed,) = poured.sealed.values()
    assert sealed.sha256 == hashlib.sha256(found[0]).hexdigest()
