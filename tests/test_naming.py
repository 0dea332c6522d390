"""Names of results: the conventions, and that the Hub takes every one of them."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from qconvert import registry
from qconvert.naming import default_name, plain

CASES = [
    ("meta-llama/Llama-2-7b-hf", "hqq", {"bits": 4}, "Llama-2-7b-hf-HQQ-4bit"),
    ("Llama-2-7b-hf", "aqlm", {"bits": 2}, "Llama-2-7b-hf-AQLM-2bit-2x8"),
    ("m", "aqlm", {"scheme": "1x16g8"}, "m-AQLM-2bit-1x16"),
    ("m", "aqlm", {"scheme": "1x16g16"}, "m-AQLM-1bit-1x16g16"),
    ("demo", "nf4", {}, "demo-NF4-4bit"),
    ("demo", "fp4", {}, "demo-FP4-4bit"),
    ("demo", "eetq", {}, "demo-EETQ-8bit"),
    ("demo", "int8", {}, "demo-INT8-8bit"),
    ("my model (v2)", "int8", {}, "my-model-v2-INT8-8bit"),
    ("../..", "int8", {}, "model-INT8-8bit"),
]


@pytest.mark.parametrize(("model", "verb", "options", "name"), CASES)
def test_conventions(model: str, verb: str, options: dict[str, object], name: str) -> None:
    method, _ = registry.info(verb).build("BF16", options)
    assert default_name(model, verb, method.options()) == name


def test_every_method_has_a_case() -> None:
    assert {case[1] for case in CASES} == {method.verb for method in registry.METHODS}


@given(st.text(max_size=200))
def test_any_folder_gives_a_name_that_the_hub_takes(model: str) -> None:
    name = default_name(model, "aqlm", {"bits": 2, "num_codebooks": 1, "nbits_per_codebook": 16,
                                        "in_group_size": 8})  # fmt: skip
    assert name.isascii()
    assert name.endswith("-AQLM-2bit-1x16")
    validate_repo_id(f"you/{name}")
    assert plain(name) == name


@given(st.text(max_size=120) | st.from_regex(r"[a-z.-]*\.git[.-]*", fullmatch=True))
def test_any_text_becomes_a_name(text: str) -> None:
    validate_repo_id(f"you/{plain(text)}")
