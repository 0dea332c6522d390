from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qconvert import contract
from qconvert.containers.bitsandbytes import BITSANDBYTES
from qconvert.methods.llm_int8 import LLMInt8
from scripts.make_golden_bitsandbytes import upstream, upstream_values
from tests.bnb_cases import (  # noqa: F401
    DTYPES,
    assert_refused,
    assert_says_where_it_is_not_finite,
    assert_threads_agree,
    assert_torch_agrees,
    every_16_bit_value,
    layer_of,
    one_thread,
    source_bits,
    weights,
)

METHOD = LLMInt8()


def assert_as_upstream(weight: torch.Tensor, dtype: str) -> None:
    parts = METHOD.quantize(source_bits(weight), dtype)
    expected = upstream(weight, METHOD)
    np.testing.assert_array_equal(parts["SCB"], expected["SCB"].numpy())
    np.testing.assert_array_equal(parts["weight"], expected["weight"].numpy())
    np.testing.assert_array_equal(METHOD.dequantize(parts), upstream_values(expected).numpy())


def test_a_row_by_hand() -> None:
    row = np.array([[0.5, -1.0, 0.25, 0.0], [0.0, -0.0, 0.0, 0.0]], np.float32)
    parts = METHOD.quantize(row, "F32")
    assert parts["SCB"].tolist() == [1.0, 0.0]
    assert parts["weight"].tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]  # 63.5 rounds to even


@settings(max_examples=60, deadline=None)
@given(weights())
def test_bytes_are_those_of_bitsandbytes(case: tuple[torch.Tensor, str]) -> None:
    weight, dtype = case
    assert_as_upstream(weight.clamp(-60_000, 60_000), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value(dtype: str) -> None:
    weight = every_16_bit_value(dtype, within=torch.float16)
    assert weight.numel() > 36_000
    assert_as_upstream(weight, dtype)


def test_float32_that_lies_between_two_halves() -> None:
    """Exact ties of the cast to float16, subnormal ones too, and their neighbours."""
    halves = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    near = torch.stack([torch.nextafter(middles, middles - 1), middles,
                        torch.nextafter(middles, middles + 1), -middles])  # fmt: skip
    weight = near.T.reshape(-1)[: near.numel() // 96 * 96].reshape(-1, 96)
    assert_as_upstream(weight, "F32")


@settings(max_examples=20, deadline=None)
@given(weights())
def test_torch_gives_the_same_bytes(case: tuple[torch.Tensor, str]) -> None:
    weight, dtype = case
    weight = weight.clamp(-60_000, 60_000)
    assert_torch_agrees(METHOD, weight, dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_an_error_that_says_where(dtype: str, bad: float) -> None:
    assert_says_where_it_is_not_finite(METHOD, dtype, bad)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_magnitude_that_float16_cannot_hold_is_an_error(dtype: str) -> None:
    weight = torch.ones(2, 64, dtype=DTYPES[dtype])
    weight[0, 1] = 65519.0 if dtype == "F32" else 65280.0
    assert_as_upstream(weight, dtype)
    weight[1, 5] = -65520.0 if dtype == "F32" else -65536.0
    message = "1 values that overflow float16, first at row 1, column 5"
    assert_refused(METHOD, weight, dtype, message)


def test_every_thread_gets_the_same_bytes() -> None:
    assert_threads_agree(METHOD)


_COLD = """
import numpy as np
from qconvert.methods.bnb_4bit import BnB4bit
from qconvert.methods.llm_int8 import LLMInt8
block = np.arange(4096, dtype=np.float32).reshape(8, 512)
with ThreadPoolExecutor(6) as pool:
    jobs = [pool.submit(m.quantize, block, "F32") for m in 3 * [LLMInt8(), BnB4bit()]]
    parts = [job.result() for job in jobs]
assert all((a["weight"] == b["weight"]).all() for a, b in zip(parts[:-2], parts[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["writable", "nowhere"])
def test_threads_may_compile_at_once(tmp_path: Path, cache: str) -> None:
    """First use in several threads, with an empty cache, and with no place for one."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    if cache == "nowhere":  # as with a read-only installation and home
        env |= {"NUMBA_CACHE_DIR": "/dev/null/no",
                "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}  # fmt: skip
    subprocess.run([sys.executable, "-c", _COLD], env=env, check=True, timeout=300)


def test_a_layer_without_weights_is_refused() -> None:
    def refusal(weight: torch.Tensor) -> str | None:
        return contract.refusal(BITSANDBYTES, layer_of(weight, "F32"), METHOD)

    assert refusal(torch.empty(0, 64)) == "the weight has no elements"
    assert refusal(torch.ones(3, 7)) is None
