"""kill -9 anywhere in a calibration: the same request goes on, and ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qconvert.conversion import Request
from tests.aqlm_runs import digest, request, source
from tests.fault.aqlm_child import Moment, run

MOMENTS = {
    "embeddings": Moment("before", "hidden-00000.bin"),
    "hessians": Moment("step", "block 1 of 2: what its layers read", 300),
    "first layer": Moment("step", "block 1 of 2: self_attn.q_proj", 1500),
    "a layer's file": Moment("before", "self_attn.o_proj.safetensors"),
    "a layer is there, the journal does not know": Moment("after", "o_proj.safetensors"),
    "last layer": Moment("step", "block 1 of 2: mlp.down_proj", 3000),
    "fine-tuning": Moment("step", "block 1 of 2: fine-tuning, step 3", 100),
    "a block's file": Moment("before", "block-00000.safetensors"),
    "a block is there, the journal does not know": Moment("after", "block-00000.safetensors"),
    "between block and states": Moment("before", "hidden-00001.bin"),
    "states of two blocks": Moment("after", "hidden-00001.bin"),
    "second block": Moment("step", "block 2 of 2: self_attn.o_proj", 1000),
    "the teacher": Moment("before", "teacher-00001.bin"),
    "end to end": Moment("step", "end to end: tuning, step 2", 100),
    "the last file": Moment("before", "end-to-end.safetensors"),
    "pouring": Moment("pour"),
    "a shard": Moment("after", "model-00002-of"),
    "the card": Moment("after", "README.md"),
}

Child = Callable[[Request, Moment | None], int]


@pytest.fixture(scope="module")
def child() -> Child:
    """Runs a request in a process of its own: its exit code, -9 if it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fault.aqlm_child"])

    def start(asked: Request, moment: Moment | None) -> int:
        process = context.Process(target=run, args=(asked, moment))
        process.start()
        process.join(300)
        assert process.exitcode is not None
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"))


def asked(model: Path, output: Path) -> Request:
    return request(model, output, calibration={"tune": "kl"}, max_shard_bytes=40_000)


@pytest.fixture(scope="module")
def whole(model: Path, child: Child, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert child(asked(model, folder), None) == 0
    return digest(folder)


def test_killed_at_every_moment_in_turn(
    model: Path, child: Child, whole: dict[str, str], tmp_path: Path
) -> None:
    """One conversion that dies eighteen times."""
    cut = asked(model, tmp_path / "out")
    for name, moment in MOMENTS.items():
        assert child(cut, moment) == -signal.SIGKILL, f"it did not die: {name}"
        assert not (tmp_path / "out").exists()
    assert child(cut, None) == 0
    assert digest(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_killed_once(
    name: str, model: Path, child: Child, whole: dict[str, str], tmp_path: Path
) -> None:
    cut = asked(model, tmp_path / "out")
    assert child(cut, MOMENTS[name]) == -signal.SIGKILL
    assert child(cut, None) == 0
    assert digest(tmp_path / "out") == whole
