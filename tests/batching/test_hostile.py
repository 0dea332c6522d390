"""Whatever a file holds, it becomes jobs or one of our errors, in bounded time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import registry
from qconvert.batching import spec, values
from qconvert.errors import QConvertError


def survives(text: str) -> spec.BatchFile | None:
    try:
        batch = spec.parse(text, "jobs.yaml")
    except QConvertError:
        return None
    for job in batch.jobs:
        assert job.label.isprintable()
        job.request.check()
        registry.info(job.request.method).build("BF16", job.request.options)
    return batch


KEYS = st.sampled_from(
    [*values.COMMON, *values.CALIBRATION, "model", "method", "bits", "group_size", "group-size",
     "axis", "double_quant", "blocksize", "compute_dtype", "scheme", "quality", "container",
     "defaults", "models", "methods", "jobs", "exclude", "settings", "disk", "retries",
     "model_name_or_path", "quantization_bit", "quantization_method", "quantization_type",
     "double_quantization", "export_dir", "export_size", "export_quantization_bit",
     "export_hub_model_id", "adapter_name_or_path", "<<", ""]
)  # fmt: skip
WORDS = st.sampled_from(
    ["demo", "org/m", "int8", "nf4", "hqq", "hqq:4", "hqq:0", "aqlm:1x16g8", "aqlm:2", "bnb:4",
     "eetq", "~", "~/x", "..", "/", "{name}", "{", "${HOME}", "${", "${A:-1}", "5GB", "a=bits:4",
     "(", "a{9999999999}", "cpu", "cuda:0", "kl", "fast", "bfloat16", "hqq:", ":", "1x99g8", "4x8",
     "\0", "\ud800", "\u202e", "9" * 30, "bnb", "gptq", "dequantize", "2x8g8", "x" * 5000]
)  # fmt: skip
SCALARS = (
    WORDS | st.none() | st.booleans() | st.integers(-1, 9) | st.floats()
    | st.sampled_from([1e400, 64, 10**25]) | st.text(max_size=4)
)  # fmt: skip
ENTRIES = st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=3), max_size=5)
JOBS = st.fixed_dictionaries(
    {"model": WORDS, "method": WORDS},
    optional={"bits": SCALARS, "output": SCALARS, "push": SCALARS},
)
THINGS: Any = SCALARS | st.lists(SCALARS | ENTRIES | JOBS, max_size=4) | ENTRIES
FILES = st.fixed_dictionaries(
    {},
    optional={
        "defaults": ENTRIES | THINGS,
        "models": st.lists(WORDS | ENTRIES, max_size=3) | THINGS,
        "methods": st.lists(WORDS | ENTRIES, max_size=3) | THINGS,
        "jobs": st.lists(JOBS | ENTRIES, max_size=3) | THINGS,
        "exclude": st.lists(JOBS | ENTRIES, max_size=2) | THINGS,
        "settings": ENTRIES | THINGS,
    },
)


SAID = st.fixed_dictionaries(
    {},
    optional={
        "output": st.sampled_from(["{name}", "~/{model}/{method}", "/x/{name}-{bits}"]),
        "skip": st.sampled_from(["a", "lm_head$"]),
        "revision": st.none() | st.just("v1"),
        "max-shard-size": st.sampled_from(["5GB", 10**9]),
        "device": st.sampled_from(["auto", "cuda:1"]),
        "threads": st.integers(1, 4),
        "validate": st.just(True),
        "push": st.booleans(),
        "group_size": st.sampled_from([32, 64, "${QCONVERT_UNSET:-8}"]),
        "nsamples": st.integers(1, 9),
        "blocksize": st.sampled_from([64, 128, 7]),
    },
)
MODELS = st.sampled_from(["demo", "org/m", "~/n", "/p/q/"])
METHODS = st.sampled_from(["int8", "nf4", "hqq:4", "hqq:3", "aqlm:2", "eetq", "hqq:7"])
LIKELY = st.fixed_dictionaries(
    {
        "models": st.lists(MODELS, min_size=1, max_size=3, unique=True),
        "methods": st.lists(METHODS, min_size=1, max_size=3, unique=True),
    },
    optional={
        "defaults": SAID,
        "exclude": st.lists(st.fixed_dictionaries({"method": METHODS}), max_size=1),
        "settings": st.fixed_dictionaries({"jobs": st.integers(0, 9), "disk": st.just("1TB")}),
    },
)


@settings(deadline=None, max_examples=80)
@given(LIKELY)
def test_likely_files_are_read_or_refused(data: dict[str, Any]) -> None:
    """Read, unless one of the few things in them that are wrong is met."""
    told = json.dumps(data)
    batch = survives(told)
    wrong = "hqq:7" in told or '"blocksize": 7' in told or '"jobs": 0' in told or "exclude" in told
    assert wrong or batch is not None
    if batch is not None:
        assert "hqq:7" not in told
        assert len({job.folder for job in batch.jobs}) == len(batch.jobs)


@settings(deadline=None, max_examples=60)
@given(FILES | st.dictionaries(KEYS, THINGS, max_size=6))
def test_anything_that_looks_like_a_file(data: dict[str, Any]) -> None:
    survives(json.dumps(data).replace("Infinity", ".inf").replace("NaN", ".nan"))


@settings(deadline=None, max_examples=80)
@given(
    st.fixed_dictionaries(
        {"model_name_or_path": SCALARS, "quantization_bit": SCALARS},
        optional={"quantization_method": WORDS, "export_quantization_bit": SCALARS,
                  "export_dir": SCALARS, "export_size": SCALARS, "model_revision": SCALARS},
    )
)  # fmt: skip
def test_anything_that_looks_like_llama_factorys(data: dict[str, Any]) -> None:
    survives(json.dumps(data).replace("Infinity", ".inf").replace("NaN", ".nan"))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60) | st.text("ab:{}[],- \n\t'\"#&*!|>%@`~$\r\ufeff\x00", max_size=40))
def test_any_text(text: str) -> None:
    survives(text)
    survives(f"models: [demo]\nmethods: [int8]\n{text}")
    survives(f"jobs:\n- model: {text}\n  method: hqq:4")


@settings(deadline=None)
@given(st.text() | WORDS)
def test_any_method(text: str) -> None:
    survives(json.dumps({"models": ["demo"], "methods": [text]}))


HOSTILE = {
    "a million characters": "models: [demo]\nmethods: [" + "h" * 900_000 + "]",
    "many unknown keys": "".join(f"k{i}: 1\n" for i in range(2000)),
    "many unknown methods": "models: a\nmethods: [" + "x, " * 3000 + "x]",
    "deep": "jobs: " + "[" * 300_000,
    "variables": "models: ['" + "${" * 100_000 + "']\nmethods: int8",
    "nested variables": "models: ['" + "${A:-" * 1000 + "}" * 1000 + "']\nmethods: int8",
    "braces": "models: a\nmethods: int8\ndefaults: {output: '" + "{" * 4000 + "'}",
    "dots": "models: a\nmethods: int8\ndefaults: {output: '" + "../" * 1300 + "'}",
    "regex": "models: a\nmethods: int8\ndefaults: {skip: '" + "(a|" * 1000 + ")" * 1000 + "'}",
    "override": "models: a\nmethods: hqq\ndefaults: {override: 'a=bits:" + "9" * 4000 + "'}",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nmodels: [*b, *b]\nmethods: int8",
    "merge keys": "jobs:\n- &a {model: demo, method: int8}\n- {<<: *a, method: nf4}",
    "all the same": "models: [" + "a, " * 500 + "a]\nmethods: [int8]",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_files_that_are_made_to_hurt(what: str) -> None:
    survives(HOSTILE[what])
