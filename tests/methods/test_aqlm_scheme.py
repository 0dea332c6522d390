"""From bits, scheme and quality to AQLM's options, and back to bits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qconvert import contract, registry
from qconvert.containers.aqlm import AQLM_CONTAINER
from qconvert.errors import UsageError
from qconvert.methods.aqlm import AQLM, QUALITIES, parse_scheme
from qconvert.methods.aqlm.schemes import build

INFO = registry.info("aqlm")


@pytest.mark.parametrize(
    ("options", "scheme", "bits"),
    [
        ({}, "2x8g8", 2),
        ({"quality": "best"}, "1x16g8", 2),
        ({"bits": 1}, "1x8g8", 1),
        ({"bits": 2}, "2x8g8", 2),
        ({"bits": 3}, "3x8g8", 3),
        ({"bits": 4}, "4x8g8", 4),
        ({"bits": 2, "quality": "fast"}, "2x8g8", 2),
        ({"bits": 2, "quality": "best"}, "1x16g8", 2),
        ({"bits": 3, "quality": "best"}, "3x8g8", 3),
        ({"bits": 2, "quality": "best", "scheme": "2x8"}, "2x8g8", 2),
        ({"scheme": "1x16g16"}, "1x16g16", 1),
        ({"scheme": "2X12 "}, "2x12g8", 3),
        ({"bits": None, "scheme": "1x6g4"}, "1x6g4", 2),
    ],
)
def test_schemes(options: dict[str, object], scheme: str, bits: int) -> None:
    method, container = INFO.build("BF16", options)
    assert isinstance(method, AQLM)
    assert (method.scheme, method.bits, method.compute_dtype) == (scheme, bits, "BF16")
    assert container is AQLM_CONTAINER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits of AQLM: expected one of 1, 2, 3, 4, got 0"),
        ({"bits": 5}, "got 5"),
        ({"bits": 3, "scheme": "2x8g8"}, "--bits 3 and --scheme 2x8g8 disagree"),
        ({"scheme": "2x8g7"}, "in_group_size 7"),
        ({"scheme": "9x8"}, "codebooks 9"),
        ({"scheme": "1x17"}, "bits of a code 17"),
        ({"scheme": "2-8"}, "is not CODEBOOKSxBITSgGROUP"),
        ({"scheme": 28}, "--scheme 28 is not CODEBOOKSxBITSgGROUP"),
        ({"bits": 2, "quality": "worst"}, "--quality 'worst': expected one of fast, default, best"),
        ({"bits": 2, "group_size": 8}, "aqlm has no option group_size"),
    ],
)
def test_what_is_no_scheme(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        INFO.build("BF16", options)


def test_the_registry_says_what_the_method_is() -> None:
    assert set(INFO.options) == {"bits", "scheme", "quality"}
    assert {info.verb for info in registry.METHODS if info.calibrated} == {"aqlm"}
    for info in registry.METHODS:
        options = {"bits": info.bits[0]} if "bits" in info.options else {}
        method, _ = info.build("F32", options)
        assert getattr(method, "calibrated", False) == info.calibrated
        assert getattr(method, "compute_dtype", "F32") == "F32"
    assert all(build(bits).bits == bits for bits in INFO.bits)
    assert QUALITIES == ("fast", "default", "best")


def test_options_are_the_contracts_parameters() -> None:
    parameters = contract.load("aqlm").variants["linear"]["parameters"]
    assert set(parameters) < set(AQLM().options())
    assert parse_scheme(AQLM(3, 9, 16).scheme) == {
        "num_codebooks": 3, "nbits_per_codebook": 9, "in_group_size": 16,
    }  # fmt: skip


def test_formulas_know_powers_and_no_more_than_they_need() -> None:
    assert contract.evaluate("2 ** bits", {"bits": 16}) == 65536
    for formula in ("2 ** 10 ** 10", "2 ** -1"):
        with pytest.raises(ValueError, match="exponent"):
            contract.evaluate(formula, {})


def test_a_method_is_listed_without_torch() -> None:
    code = (
        "import sys; from qconvert import registry\n"
        "method, container = registry.info('aqlm').build('BF16', {'bits': 2})\n"
        "assert not {'torch', 'transformers', 'numba', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
