"""Calls that were heard, and what may be concluded from them for other batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qconvert.calibration.calls import Call, Calls, split
from qconvert.errors import UnsupportedConfig


def heard(one: Any, two: Any) -> Calls:
    return Calls([Call((), {"x": one}, True)], [Call((), {"x": two}, True)])


def expanded(one: Any, two: Any, n: int) -> Any:
    return heard(one, two).call(0, n).kwargs["x"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_grows_with_the_batch_is_expanded(n: int) -> None:
    mask = torch.randn(1, 1, 4, 4)
    found = expanded(mask, mask.expand(2, 1, 4, 4), n)
    assert torch.equal(found, mask.expand(n, 1, 4, 4))
    assert found.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_heads_of_all_samples_in_one_dimension(n: int) -> None:
    bias = torch.randn(3, 1, 4)
    found = expanded(bias, torch.cat([bias, bias]), n)
    assert torch.equal(found.view(n, 3, 1, 4), bias.expand(n, 3, 1, 4))


def test_nested_and_plain_arguments() -> None:
    cos, mask = torch.randn(1, 4, 2), torch.randn(1, 4)
    one = {"rotary": (cos, cos), "mask": {"full": mask}, "window": 8, "cache": None, "eps": 1e-5}
    two = {**one, "mask": {"full": mask.expand(2, 4)}}
    found = expanded(one, two, 3)
    assert torch.equal(found["mask"]["full"], mask.expand(3, 4))
    assert found["rotary"][0] is cos
    assert (found["window"], found["cache"], found["eps"]) == (8, None, 1e-5)


TENSOR = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("one", "two", "why"),
    [
        (TENSOR, TENSOR + 1, "x depends on the tokens"),
        (TENSOR, torch.tensor([[1.0] * 4, [2.0] * 4]), "x depends on the tokens"),
        (TENSOR, TENSOR.expand(3, 4), "x depends on the tokens"),
        ({"mask": (TENSOR,)}, {"mask": (TENSOR + 1,)}, r"x\['mask'\]\[0\] depends"),
        (3, 4, "x is a int that differs"),
        (object(), object(), "x is a object that differs"),
        ({}, {}, "x is state that blocks share"),
        (TENSOR, None, "x is a Tensor that differs"),
    ],
)
def test_what_another_text_changes_is_refused(one: Any, two: Any, why: str) -> None:
    with pytest.raises(UnsupportedConfig, match=why):
        heard(one, two)


def test_other_arguments() -> None:
    with pytest.raises(UnsupportedConfig, match="other arguments"):
        Calls([Call((), {"x": 1}, True)], [Call((), {"y": 1}, True)])


def test_hidden_states_come_first_or_by_name() -> None:
    hidden = torch.ones(1)
    for args, kwargs in (((hidden, 2), {"mask": None}), ((), {"hidden_states": hidden, "z": 1})):
        found, call = split(args, kwargs)
        assert found is hidden
        seen = call(lambda *a, **k: ((a, k),), found)  # a block that returns a tuple
        assert seen == (args, kwargs)
    with pytest.raises(UnsupportedConfig, match="without hidden_states"):
        split((), {"x": hidden})
