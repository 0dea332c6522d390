"""Hidden states on disk: what is written is read, and a file that is there is complete."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.calibration.activations import Activations, nbytes, writing
from qconvert.errors import CorruptFile, DiskFull, NotFound, NotWritable

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SHAPE = (5, 3, 8)


def states(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(path: Path, hidden: torch.Tensor, dtype: str, batch: int = 2) -> Activations:
    shape = tuple(hidden.shape)
    with writing(path, shape, dtype) as writer:
        for part in hidden.split(batch):
            writer.append(part)
    return Activations(path, shape, dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, 6),) * 3), st.integers(1, 7), st.sampled_from(sorted(DTYPES)),
    st.integers(0, 99),
)  # fmt: skip
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    batch: int,
    dtype: str,
    seed: int,
) -> None:
    hidden = states(seed, shape)
    path = tmp_path_factory.mktemp("a") / "hidden-00000.bin"
    found = write(path, hidden, dtype, batch)
    rounded = hidden.to(DTYPES[dtype])
    assert len(found) == shape[0]
    assert torch.equal(torch.cat(list(found.batches(batch))), rounded)
    assert path.read_bytes() == rounded.contiguous().view(torch.uint8).numpy().tobytes()
    assert path.stat().st_size == nbytes(shape, dtype)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_samples_in_the_order_asked_for(tmp_path: Path) -> None:
    hidden = states()
    found = write(tmp_path / "a.bin", hidden, "F32")
    assert torch.equal(found[[3, 0, 3]], hidden[[3, 0, 3]])
    assert torch.equal(found[1:3], hidden[1:3])
    taken = found[0:1]
    taken.zero_()  # a copy: the file stays
    assert torch.equal(found[0:1], hidden[0:1])


def test_batches_in_the_dtype_that_is_computed_in(tmp_path: Path) -> None:
    found = write(tmp_path / "a.bin", states(), "BF16")
    batches = list(found.batches(2, "cpu", torch.float32))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert {batch.dtype for batch in batches} == {torch.float32}
    assert torch.equal(torch.cat(batches), states().bfloat16().float())


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", states().requires_grad_() * 2, "F32")


# ── what is not there, or not whole ──────────────────────────────────────────────────────────


def write_two(path: Path, error: type[BaseException] | None) -> None:
    with writing(path, SHAPE, "F32") as writer:
        writer.append(states()[:2])
        assert not path.exists()
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_a_file_appears_only_when_complete(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    why = None if error else "2 samples written of 5"
    with pytest.raises(error or ValueError, match=why):
        write_two(tmp_path / "hidden-00001.bin", error)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    old = write(path, states(1), "F32")
    with pytest.raises(KeyboardInterrupt), writing(path, SHAPE, "F32"):
        raise KeyboardInterrupt
    assert torch.equal(old[0:5], states(1))


@pytest.mark.parametrize("part", [states()[:, :2], states(0, (6, 3, 8)), states(0, (1, 3, 9))])
def test_batches_of_another_shape(tmp_path: Path, part: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="after 0 of"), writing(tmp_path / "a", SHAPE, "F32") as w:
        w.append(part)


def test_files_that_are_not_these_activations(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Activations(tmp_path / "none.bin", SHAPE, "F32")
    path = tmp_path / "a.bin"
    write(path, states(), "F32")
    for shape, dtype in (((5, 3, 9), "F32"), ((4, 3, 8), "F32"), (SHAPE, "BF16")):
        with pytest.raises(CorruptFile, match="480"):
            Activations(path, shape, dtype)


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes: a full disk, as far as write() knows.

    Not a fixture: pytest writes to its own output between a test and the end of its fixtures.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_says_so_before_the_work(tmp_path: Path) -> None:
    reached = False
    full = pytest.raises(DiskFull, match=r"a\.bin")
    with full, small_files(), writing(tmp_path / "a.bin", SHAPE, "F32"):
        reached = True
    assert not reached
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "a.bin"
    with pytest.raises(NotWritable, match="gone"), writing(path, SHAPE, "F32"):
        pass
