"""LLaMA-Factory's files convert as they are, or say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconvert.batching import spec
from qconvert.errors import InvalidJobs
from qconvert.hub.target import PushOptions
from qconvert.layout import DEFAULT_SHARD_BYTES

QLORA = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
double_quantization: false
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048

### output
output_dir: saves/${oc.env:USER}/lora/sft
hub_model_id: me/my-adapter
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
ddp_timeout: 180000000

### eval
# val_size: 0.1
"""
"""The shape of examples/train_qlora/llama3_lora_sft_bnb_npu.yaml."""


def read(text: str) -> spec.BatchFile:
    return spec.parse(text, "sft.yaml")


def request(more: str) -> Any:
    (job,) = read(f"model_name_or_path: org/m\n{more}").jobs
    return job.request


def mistakes(more: str) -> list[tuple[int, str]]:
    with pytest.raises(InvalidJobs) as caught:
        read(f"model_name_or_path: org/m\n{more}")
    return [*caught.value.problems]


def test_an_example_converts_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "llama3_lora_sft_bnb_npu.yaml"
    path.write_text(QLORA)
    batch = spec.read(path)
    (job,) = batch.jobs
    assert job.request == type(job.request)(
        "meta-llama/Meta-Llama-3-8B-Instruct", "nf4", {"double_quant": False}
    )
    assert (job.line, job.label) == (
        3,
        "meta-llama/Meta-Llama-3-8B-Instruct nf4 double_quant=False",
    )
    assert job.name == "Meta-Llama-3-8B-Instruct-NF4-4bit"
    assert batch.settings == spec.Settings()
    assert [key for key, _ in batch.ignored] == [
        "trust_remote_code", "stage", "do_train", "finetuning_type", "lora_rank", "lora_target",
        "dataset", "template", "cutoff_len", "output_dir", "hub_model_id", "report_to",
        "learning_rate", "num_train_epochs", "bf16", "ddp_timeout",
    ]  # fmt: skip
    assert batch.ignored[0] == ("trust_remote_code", 6)


@pytest.mark.parametrize(
    ("said", "verb", "options"),
    [
        ("quantization_bit: 4", "nf4", {"double_quant": True}),
        ("quantization_bit: 8", "int8", {}),
        ("quantization_bit: 4\nquantization_method: bitsandbytes", "nf4", {"double_quant": True}),
        ("quantization_bit: 4\nquantization_type: fp4", "fp4", {"double_quant": True}),
        ("quantization_bit: 4\ndouble_quantization: true", "nf4", {"double_quant": True}),
        ("quantization_bit: 4\nquantization_type: nf4\ndouble_quantization: false", "nf4",
         {"double_quant": False}),
        ("quantization_bit: 8\nquantization_method: eetq", "eetq", {}),
        *((f"quantization_bit: {bits}\nquantization_method: hqq", "hqq", {"bits": bits})
          for bits in (2, 3, 4, 5, 6, 8)),
    ],
)  # fmt: skip
def test_methods_and_bits(said: str, verb: str, options: dict[str, Any]) -> None:
    asked = request(said)
    assert (asked.method, asked.options) == (verb, options)


@pytest.mark.parametrize(
    "said",
    [
        *(f"quantization_bit: {bits}" for bits in (1, 2, 3, 5, 6, 7, 0, 16)),
        *(f"quantization_bit: {bits}\nquantization_method: hqq" for bits in (1, 7, 9)),
        *(f"quantization_bit: {bits}\nquantization_method: eetq" for bits in (4, 2)),
        *(f"quantization_bit: 4\nquantization_method: {name}" for name in ("gptq", "awq", "BNB")),
    ],
)
def test_what_a_method_cannot_do_names_what_it_can(said: str) -> None:
    ((line, what),) = mistakes(said)
    assert line == (3 if "quantization_method: " in what else 2)
    assert "bitsandbytes 4, 8; hqq 2, 3, 4, 5, 6, 8; eetq 8" in what


def test_export_says_where_the_result_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "models")
    asked = request(
        "quantization_bit: 4\nmodel_revision: v1\nexport_dir: ${HERE}/m\nexport_size: 2\n"
        "export_device: cpu\nexport_legacy_format: false\nexport_hub_model_id: me/m"
    )
    assert (asked.revision, asked.output, asked.device) == ("v1", Path("models/m"), "cpu")
    assert asked.max_shard_bytes == 2 * 10**9
    assert asked.push == PushOptions("me/m")
    private = request("quantization_bit: 4\nexport_hub_model_id: me/m\nhub_private_repo: true")
    assert private.push == PushOptions("me/m", private=True)
    plain = request("quantization_bit: 4\nmodel_revision: main\nhub_private_repo: true")
    assert (plain.revision, plain.push) == (None, None)
    assert plain.max_shard_bytes == DEFAULT_SHARD_BYTES


def test_what_means_nothing_to_the_method_is_ignored() -> None:
    text = "double_quantization: true\nmodel_name_or_path: m\nquantization_type: fp4\n"
    batch = read(text + "x: 1\nquantization_bit: 8\nadapter_name_or_path:\nhf_hub_token: null")
    assert batch.ignored == (("double_quantization", 1), ("quantization_type", 3), ("x", 4))


def test_gptq_is_refused_with_what_to_use_instead() -> None:
    ((line, what),) = mistakes(
        "export_dir: saves/my model\nexport_quantization_bit: 4\n"
        "export_quantization_dataset: data/c4_demo.jsonl\nexport_quantization_nsamples: 64\n"
        "export_quantization_maxlen: 512\nexport_size: 5"
    )
    assert line == 3
    assert "GPTQ" in what
    instead = "quantization_bit: 4 and quantization_method: hqq"
    assert instead in what
    assert request(instead.replace(" and ", "\n")).method == "hqq"
    (job,) = spec.parse(what[what.index("jobs: ") :], "x").jobs
    assert (job.request.model, job.request.method) == ("org/m", "aqlm")
    assert job.request.options == {"bits": 4}
    assert job.request.output == Path("saves/my model")
    calibration = job.request.calibration
    assert calibration is not None
    assert (calibration.source, calibration.nsamples, calibration.seqlen) == (
        "data/c4_demo.jsonl", 64, 512
    )  # fmt: skip


def test_gptq_of_eight_bits_has_no_calibrated_kin() -> None:
    ((_, what),) = mistakes("export_quantization_bit: 8")
    assert "quantization_bit: 8 and quantization_method: hqq" in what
    assert "aqlm" not in what


@pytest.mark.parametrize(
    ("said", "line", "what"),
    [
        ("stage: sft", 1, "no quantization_bit"),
        ("quantization_bit:", 1, "no quantization_bit"),
        ("quantization_bit: four", 2, "quantization_bit: expected a whole number, got 'four'"),
        ("quantization_bit: 4\nquantization_type: nf5", 3, "expected nf4 or fp4, got 'nf5'"),
        ("quantization_bit: 4\ndouble_quantization: 'no'", 3, "expected true or false"),
        ("quantization_bit: 4\ndouble_quantisation: no", 3, "did you mean double_quantization?"),
        ("quantization_bit: 4\nexport_size: 5GB", 3, "expected a number from 1"),
        ("quantization_bit: 4\nexport_device: cuda", 3, "expected cpu or auto, got 'cuda'"),
        ("quantization_bit: 4\nexport_legacy_format: true", 3, "export_legacy_format: false"),
        ("quantization_bit: 4\nadapter_name_or_path: saves/x", 3, "llamafactory-cli export"),
        ("quantization_bit: 4\nexport_dir: ${QCONVERT_UNSET}", 3, "QCONVERT_UNSET is not set"),
        ("quantization_bit: 4\nexport_hub_model_id: a/b/c", 3, "not ORG/NAME"),
    ],
)
def test_mistakes(said: str, line: int, what: str) -> None:
    ((where, told),) = mistakes(said)
    assert where == line
    assert what in told


@pytest.mark.parametrize("key", ["hf_hub_token", "hub_token"])
def test_a_token_is_neither_used_nor_printed(key: str) -> None:
    with pytest.raises(InvalidJobs) as caught:
        read(f"model_name_or_path: m\nquantization_bit: 4\n{key}: hf_SECRET")
    assert "SECRET" not in str(caught.value)
    assert f"sft.yaml:3: {key}: write no token in a file: export HF_TOKEN" in str(caught.value)
    batch = read("model_name_or_path: m\nquantization_bit: 4\nms_hub_token: SECRET")
    assert "SECRET" not in repr(batch)


def test_no_model_is_a_mistake_too() -> None:
    with pytest.raises(InvalidJobs, match=r"sft\.yaml:2: model_name_or_path: expected text"):
        read("quantization_bit: 4\nmodel_name_or_path:")
