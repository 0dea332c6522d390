"""The Python API; what a conversion promises about memory and about weights that are no numbers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qconvert
from qconvert import errors, registry
from qconvert.tensors import read_header
from qconvert.types import Verdict
from tests.models import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source") / "tiny")


def test_functions_stay_functions_after_every_import(source: Path, tmp_path: Path) -> None:
    planned = qconvert.plan(source, "hqq", bits=4, group_size=32)
    result = qconvert.convert(
        source, "hqq", bits=4, group_size=32, output=tmp_path / "out", validate=False, device="cpu"
    )
    assert result.plan.total_bytes == planned.total_bytes
    found = qconvert.validate(tmp_path / "out", against=source, levels=["contract", "numeric"])
    assert [report.passed for report in found.reports] == [True, True]
    assert callable(qconvert.plan)
    assert callable(qconvert.convert)
    assert callable(qconvert.validate)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qconvert; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "typer", "rich"} & set(json.loads(done.stdout))


def test_the_demo_is_verified(tmp_path: Path) -> None:
    """The README's promise: the built-in model, all three levels, and text that means something."""
    result = qconvert.convert("demo", "nf4", output=tmp_path / "out", device="cpu")
    assert result.verdict is Verdict.VERIFIED
    data = {report.level: report.data for report in result.reports}["reload"]
    assert 20 < data["source_perplexity"] < 60
    assert data["perplexity"] < 1.1 * data["source_perplexity"]
    assert data["kl_divergence"] < 0.03
    assert len(set(data["samples"]["quantized"].split())) > 5
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("# demo", "base_model_relation: quantized", "verified", "perplexity"):
        assert fact in card


@pytest.mark.parametrize("method", ["int8", "nf4", "hqq"])
def test_the_planned_peak_memory_is_an_upper_bound(method: str, tmp_path: Path) -> None:
    """Of a process that does nothing else. (Its ru_maxrss would be that of this test process.)"""
    code = (
        "import json, re, sys, qconvert\n"
        "options = {'bits': 4} if sys.argv[1] == 'hqq' else {}\n"
        "result = qconvert.convert('demo', sys.argv[1], output=sys.argv[2],"
        " validate=False, device='cpu', **options)\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]) * 1024\n"
        "print(json.dumps([peak, result.plan.peak_bytes]))"
    )
    command = [sys.executable, "-c", code, method, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, bound = json.loads(done.stdout)
    assert peak <= bound < 1_200_000_000


def plant(model: Path, name: str, value: float) -> None:
    """Overwrites the third element of a BF16 tensor."""
    _, infos, _ = read_header(model / "model.safetensors")
    info = next(info for info in infos if info.name == name)
    bits: Any = np.array([value], np.float32).view(np.uint32) >> 16
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(info.start + 4)
        file.write(bits.astype(np.uint16).tobytes())


@pytest.mark.parametrize("method", ["int8", "nf4", "hqq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_weight_that_is_no_number_is_named_and_the_hint_helps(
    method: str, value: float, tmp_path: Path
) -> None:
    source = tiny("llama", tmp_path / "source")
    bad = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for name in bad:
        plant(source, f"{name}.weight", value)
    options: dict[str, Any] = {"output": tmp_path / "out", "validate": False, "device": "cpu"}
    if method == "hqq":
        options["bits"] = 4
    with pytest.raises(errors.NonFinite) as caught:
        qconvert.convert(source, method, **options)
    assert all(name in str(caught.value) for name in bad)
    assert not list(tmp_path.glob("*out*")), "a plan that can never succeed left its staging"
    skip = caught.value.hint.split("--skip ")[1].strip("'")
    result = qconvert.convert(source, method, skip=skip, **options)
    assert set(bad) <= set(result.plan.skip_modules)


# ── what the command line can do, Python can ─────────────────────────────────────────────────

FUNCTIONS = {
    "bnb": "convert", "plan": "plan", "convert": "convert_together", "dequantize": "dequantize",
    "transcode": "transcode", "inspect": "inspect", "validate": "validate", "verify": "validate",
    "reproduce": "reproduce", "formats": "formats", "doctor": "doctor", "card": "model_card",
    "push": "push", "batch": "batch", "compare": "compare",
}  # fmt: skip
"""Verb → function; a method's verb is `convert` with its name."""
ELSEWHERE = {
    # how the command line prints
    "json", "quiet", "dry_run", "lint",
    # details of a push, which the API has in PushOptions
    "repo_id", "private", "push_revision", "create_pr", "push_unverified", "repo",
    # the method's own options, **options
    "bits", "scheme", "quality", "group_size", "axis", "container", "zero", "double_quant",
    "blocksize", "compute_dtype", "dtype",
}  # fmt: skip
OTHER_NAMES = {
    "no_validate": "validate", "override": "overrides", "max_shard_size": "max_shard_bytes",
    "level": "levels", "loader": "loaders", "to": "methods", "model": "path", "path": "target",
    "file": "jobs",
}  # fmt: skip


def commands() -> dict[str, Any]:
    """Verb → callback, a group's verbs by the name of the group."""
    from qconvert.cli import app

    found = {command.name: command.callback for command in app.registered_commands}
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            found[f"{group.name} {command.name}"] = command.callback
    return found


def test_every_verb_and_option_is_in_the_api() -> None:
    methods = {method.verb for method in registry.METHODS}
    for verb, callback in commands().items():
        name = "convert" if verb in methods else FUNCTIONS[verb.partition(" ")[0]]
        function = getattr(qconvert, name)
        takes = set(inspect.signature(function).parameters)
        if "more" in takes:  # what `convert` takes
            takes |= set(inspect.signature(qconvert.convert).parameters)
        ours = {"device"} if verb.startswith("plan ") else set()  # a plan is the same on all
        for option in set(inspect.signature(callback).parameters) - ELSEWHERE - ours:
            assert takes & {option, OTHER_NAMES.get(option, option)}, f"{verb}: {option}"


def test_what_takes_long_tells_how_far_it_is() -> None:
    for name in ("convert", "convert_together", "validate", "reproduce", "push", "compare"):
        assert "progress" in inspect.signature(getattr(qconvert, name)).parameters


def test_every_public_name_is_there_and_documented() -> None:
    from qconvert import api

    assert sorted(qconvert.__all__) == sorted([*api.__all__, "__version__"])
    for name in api.__all__:
        thing = getattr(qconvert, name)
        assert thing is getattr(api, name)
        assert inspect.isfunction(thing) or isinstance(thing, type) or name == "Outcome"
        if inspect.isfunction(thing):
            assert inspect.signature(thing).return_annotation not in (None, "None", "Any")
            assert len(thing.__doc__ or "") > 40, name


def test_inspect_formats_and_doctor_are_typed(source: Path, tmp_path: Path) -> None:
    made = qconvert.convert(source, "nf4", output=tmp_path / "o", validate=False, device="cpu")
    found = qconvert.inspect(tmp_path / "o")
    assert (found.format, found.verdict) == ("bitsandbytes", "not validated")
    assert found.fingerprint == made.plan.fingerprint
    assert found.bits_per_weight == pytest.approx(made.plan.bits_per_weight)
    layers = [module for module in found.modules.values() if module.method == "bnb_4bit"]
    assert len(layers) == len(list(made.plan.quantized()))
    listed = qconvert.formats()
    assert [method.verb for method in listed.methods] == [it.verb for it in registry.METHODS]
    assert any(it.loader.startswith("transformers") for it in listed.loaders["bitsandbytes"])
    here = qconvert.doctor()
    assert "numpy" in [library.name for library in here.libraries if library.ok]
    assert here.machine["processors"] > 0
    card = (tmp_path / "o" / "README.md").read_text()
    assert qconvert.model_card(tmp_path / "o") == card
    assert {finding.level for finding in qconvert.lint_card(tmp_path / "o")} == {"warning"}


def test_several_formats_of_one_read(source: Path, tmp_path: Path) -> None:
    done: list[int] = []
    seen: list[str] = []
    results = qconvert.convert_together(
        source, ["int8", "hqq:4"], output=tmp_path / "all", validate=False, device="cpu",
        progress=lambda at, total, what: seen.append(what),
        on_result=lambda index, outcome: done.append(index),
    )  # fmt: skip
    assert sorted(done) == [0, 1]
    assert seen
    assert [result.folder for result in results if isinstance(result, qconvert.Result)] == [
        tmp_path / "all" / "llama-INT8-8bit",
        tmp_path / "all" / "llama-HQQ-4bit",
    ]
    with pytest.raises(errors.UsageError, match="hqq:4 twice"):
        qconvert.convert_together(source, ["hqq:4", "hqq:4"])
    with pytest.raises(errors.UsageError, match="one repository"):
        qconvert.convert_together(source, ["int8"], push=qconvert.PushOptions("org/name"))
