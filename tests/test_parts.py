"""A conversion in parts: who pours what, and what an ordinary conversion makes of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert import parts
from qconvert.conversion import Request, convert
from qconvert.errors import Interrupted, Locked, StaleStaging, UsageError
from qconvert.validation.comparison import Errors
from tests.fault.test_kill import digest, run_forked
from tests.models import tiny

OF = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("source"), max_shard_size="50KB")


def request(source: Path, output: Path, **more: Any) -> Request:
    made = Request(
        str(source), "hqq", {"bits": 4}, output=output, max_shard_bytes=34_000, threads=1,
        validate=False,
    )  # fmt: skip
    return replace(made, **more)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "out"
    convert(request(source, folder))
    return digest(folder)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=50), st.integers(1, 12))
def test_every_shard_has_one_part_and_neighbours_stay_together(sizes: list[int], of: int) -> None:
    shards = [SimpleNamespace(size=size) for size in sizes]
    plan: Any = SimpleNamespace(shards=shards, weight_bytes=sum(sizes))
    shares = [parts.share(plan, part, of) for part in range(of)]
    assert [shard for one in shares for shard in one] == shards
    largest = max(sum(shard.size for shard in one) for one in shares)
    assert largest <= sum(sizes) / of + max(sizes)


def test_what_parts_have_poured_and_proved_is_the_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = (request(source, tmp_path / name, validate=True) for name in ("a", "b"))
    convert(alone)
    for part in range(OF):
        parts.pour_part(shared, part, OF)
    assert not (tmp_path / "b").exists()

    def read(*_: Any) -> Errors:
        raise AssertionError("a layer was compared again")

    monkeypatch.setattr("qconvert.validation.pairs.layer_errors", read)
    assert convert(shared).resumed_bytes > 0
    assert digest(tmp_path / "b") == digest(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    parts.pour_part(shared, 0, OF)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"], "of a finished result nothing is poured"


class Stop:
    """Progress that is interrupted by its `at`-th word."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.said: list[int] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        self.said.append(done)
        if len(self.said) == self.at:
            raise Interrupted(2)


def test_a_part_that_is_cut_goes_on_and_what_it_leaves_is_done_by_the_conversion(
    source: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    asked = request(source, tmp_path / "out")
    cut, again = Stop(3), Stop(0)
    with pytest.raises(Interrupted):
        parts.pour_part(asked, 0, 2, progress=cut)
    parts.pour_part(asked, 0, 2, progress=again)
    assert again.said[0] > cut.said[0], "what was finished is not poured again"
    with pytest.raises(Interrupted):
        parts.pour_part(asked, 1, 2, progress=Stop(3))
    assert convert(asked).resumed_bytes > again.said[-1]
    assert digest(tmp_path / "out") == expected


def test_a_conversion_that_was_cut_goes_on_in_parts(
    source: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    asked = request(source, tmp_path / "out")
    with pytest.raises(Interrupted):
        convert(asked, progress=Stop(4))
    tree = tmp_path / ".out.qconvert-staging" / "tree"
    assert list(tree.glob("*.part"))
    for part in range(2):
        parts.pour_part(asked, part, 2)
    convert(asked)
    assert digest(tmp_path / "out") == expected


def test_killed_while_it_takes_over_what_parts_have_made(
    source: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    asked = request(source, tmp_path / "out")
    poured = tmp_path / ".out.qconvert-staging"
    for part in range(2):
        parts.pour_part(asked, part, 2)
    shutil.copytree(poured, tmp_path / "kept")
    convert(asked)
    deaths = 0
    for number, point in enumerate(range(1, 40, 3)):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", poured)
        status, _ = run_forked(asked, point, ("before", "after", "torn")[number % 3])
        deaths += os.WIFSIGNALED(status)
        if not (tmp_path / "out").exists():
            convert(asked)
        assert digest(tmp_path / "out") == expected
    assert deaths > 5


def test_a_part_at_work_keeps_others_out(source: Path, tmp_path: Path) -> None:
    asked = request(source, tmp_path / "out")
    refused: list[type[Exception]] = []

    def meanwhile(done: int, total: int, what: str) -> None:
        if not refused:
            for call in (lambda: parts.pour_part(asked, 0, OF), lambda: convert(asked)):
                with pytest.raises(Locked) as error:
                    call()
                refused.append(error.type)

    parts.pour_part(asked, 0, OF, progress=meanwhile)
    assert refused == [Locked, Locked]


def test_parts_of_another_plan_are_in_the_way_until_restart(
    source: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    asked = request(source, tmp_path / "out")
    other = replace(asked, options={"bits": 8})
    parts.pour_part(other, 0, OF)
    for call in (lambda: parts.pour_part(asked, 0, OF), lambda: convert(asked)):
        with pytest.raises(StaleStaging):
            call()
    convert(replace(asked, restart=True))
    assert digest(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"method": "aqlm", "options": {}}, "aqlm reads every block several times"),
        ({"restart": True}, "thrown away"),
    ],
)
def test_what_cannot_be_done_in_parts(
    source: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        parts.pour_part(request(source, tmp_path / "out", **change), 0, OF)
