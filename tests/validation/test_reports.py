"""Verdicts as architecture.md defines them, and the errors that name the worst offender."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import contract, text
from qconvert.errors import ContractViolation, NumericMismatch, ReloadFailed, ValidationError
from qconvert.types import Check, Report, Verdict
from qconvert.validation import require, schema, verdict

GOOD = [Check("fine", True)]
BAD = [Check("fine", True), Check("first", False, "layer a: 3"), Check("second", False, "b")]


def reports(contract: str, numeric: str, reload: str) -> list[Report]:
    made = []
    for level, state in (("contract", contract), ("numeric", numeric), ("reload", reload)):
        if state == "skipped":
            made.append(Report(level, [], skipped="no source"))
        elif state != "absent":
            made.append(Report(level, GOOD if state == "passed" else BAD))
    return made


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("passed", "passed", "passed"), Verdict.VERIFIED),
        (("passed", "passed", "skipped"), Verdict.CHECKED),
        (("passed", "passed", "failed"), Verdict.FAILED),
        (("passed", "failed", "skipped"), Verdict.FAILED),
        (("failed", "skipped", "skipped"), Verdict.FAILED),
        (("passed", "skipped", "failed"), Verdict.FAILED),
        (("passed", "skipped", "passed"), None),
        (("passed", "skipped", "skipped"), None),
        (("passed", "passed", "absent"), None),
        (("passed", "absent", "absent"), None),
        (("absent", "passed", "passed"), None),
    ],
)
def test_verdicts(states: tuple[str, str, str], expected: Verdict | None) -> None:
    assert verdict(reports(*states)) is expected


@pytest.mark.parametrize(
    ("level", "error"),
    [("contract", ContractViolation), ("numeric", NumericMismatch), ("reload", ReloadFailed)],
)
def test_the_error_is_the_levels_and_names_the_first_check(
    level: str, error: type[ValidationError]
) -> None:
    with pytest.raises(error, match=r"first: layer a: 3 \(and 1 more\)") as caught:
        require([Report("contract", GOOD), Report(level, BAD)])
    assert caught.value.exit_code == 6
    assert caught.value.hint
    require([Report(level, GOOD), Report(level, [], skipped="why")])


# ── the schema reader says what the library says ─────────────────────────────────────────────

SCHEMAS: Mapping[str, Any] = {
    name: contract.load(name).schema for name in contract.names() if contract.load(name).variants
}
VALID: Mapping[str, Any] = {
    "bitsandbytes": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"],
    },
    "hqq": {
        "quant_method": "hqq", "skip_modules": ["lm_head"],
        "quant_config": {
            "offload_meta": False, "scale_quant_params": None, "zero_quant_params": None,
            "weight_quant_params": {
                "axis": 1, "channel_wise": True, "group_size": 64, "nbits": 4, "optimize": True,
                "round_zero": True, "view_as_float": False,
            },
        },
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "lm_head": False, "dynamic": {"-:lm_head$": {}},
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    },
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    },
    "eetq": {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]},
    "aqlm": {
        "quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2,
        "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"],
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "dequantize": True,
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "format": "pack-quantized", "input_activations": None, "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group",
                    "group_size": 64, "dynamic": False, "actorder": None,
                },
            },
        },
    },
}  # fmt: skip
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(0, 9), st.text(max_size=5),
    st.sampled_from([[], {}, ["a", "a"], [""], [True, 1], {"axis": 1}, 4.0, "nf4", "bitsandbytes"]),
)  # fmt: skip


def test_every_format_has_an_example() -> None:
    assert VALID.keys() == SCHEMAS.keys()
    for name, value in VALID.items():
        jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
        assert list(schema.violations(value, SCHEMAS[name])) == []
        jsonschema.validate(value, SCHEMAS[name], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", SCHEMAS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_it_agrees_with_the_library(name: str, data: st.DataObject) -> None:
    value = json.loads(json.dumps(VALID[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = value
        keys = [k for k, v in place.items() if isinstance(v, dict)]
        while keys and data.draw(st.booleans()):
            place = place[data.draw(st.sampled_from(keys))]
            keys = [k for k, v in place.items() if isinstance(v, dict)]
        key = data.draw(st.sampled_from([*place, "bnb_4bit_new", "unknown"]))
        if data.draw(st.booleans()):
            place.pop(key, None)
        else:
            place[key] = deepcopy(data.draw(JUNK))  # or the next round changes the strategy's own
    expected = jsonschema.Draft202012Validator(SCHEMAS[name]).is_valid(value)
    found = list(schema.violations(value, SCHEMAS[name]))
    assert (not found) == expected, found


def test_an_unknown_keyword_is_never_a_pass() -> None:
    with pytest.raises(ValueError, match="unknown keyword"):
        list(schema.violations({}, {"contains": {}}))


def test_bytes_are_said_in_words_too() -> None:
    data = {"loaded_bytes": 86_832, "peak_bytes": None, "bytes": 12, "device": "cpu"}
    assert text.figures(data) == [
        ("loaded bytes", "86,832 (86.8 kB)"),
        ("bytes", "12"),
        ("device", "cpu"),
    ]
