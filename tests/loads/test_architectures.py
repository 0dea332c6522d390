"""Any architecture: convert, load with stock `from_pretrained`, compare with our dequantization.

Every tiny model is loaded by one loader here, and by all of them in the slow tests. The inputs are
the model's own: pictures, sound, both halves of an encoder–decoder. The plain model class that
holds the weights that we decode says what must come out. What cannot be done is refused in the
plan, with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qconvert.loaders  # noqa: F401 - transformers 5 reads HQQ after this
from qconvert import manifest, rehearsal
from qconvert.conversion import Request, convert, plan
from qconvert.errors import UnsupportedConfig, UsageError
from qconvert.linears import generalize
from qconvert.stored import open_stored
from qconvert.types import Kind
from qconvert.validation import loaders, measure, steps
from qconvert.validation.reload import HELD_OUT
from scripts import make_architectures
from tests.loads.runs import quantized_modules
from tests.models import save
from tests.tiny_models import (
    AUDIO,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    RECURRENT,
    TINY,
    VISION,
    VISION_LANGUAGE,
    Tiny,
    inputs,
)

CLASSES = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "hqq": "HQQLinear"}
METHODS: dict[str, dict[str, Any]] = {"int8": {}, "nf4": {}, "hqq": {"bits": 4}}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative error of the output against our own dequantization."""
INT8_ERROR, INT8_KL = 0.03, 1e-3
"""LLM.int8 quantizes the activations too: relative error, or for logits of text, nats a token. A
router that sees them may send a token to another expert."""


@dataclass(frozen=True)
class Case:
    """A tiny model, how it is quantized, and the dtype of its source."""

    model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"


UNDONE = {"gpt2-hqq", "convnext-int8"}
"""Models of which no layer can be quantized so: see the test of what is refused."""
EVERY = {
    f"{model}-{method}": Case(model, method, options)
    for model in TINY
    for method, options in METHODS.items()
    if f"{model}-{method}" not in UNDONE
}
_TURNS = [list(METHODS)[turn:] + list(METHODS)[:turn] for turn in range(3)]
QUICK = [
    next(name for method in _TURNS[index % 3] if (name := f"{model}-{method}") in EVERY)
    for index, model in enumerate(TINY)
]
"""One for each model, methods in turn."""
FULL = {
    **{name: case for name, case in EVERY.items() if name not in QUICK},
    **{
        f"{model}-hqq3-axis0": Case(model, "hqq", {"bits": 3, "axis": 0})
        for model in (*DECODERS, *ENCODER_DECODERS, *AUDIO)
        if f"{model}-hqq" not in UNDONE
    },
    **{
        f"{model}-{method}-{dtype}": Case(model, method, options, dtype)
        for model in ("olmo2", "bloom", "recurrent-gemma", "roberta", "bart", "vit", "qwen2.5-vl")
        for method, options in METHODS.items()
        for dtype in ("float16", "float32")
    },
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads make tiny layers slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", QUICK)
def test_round_trip(name: str, tmp_path: Path) -> None:
    round_trip(EVERY[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_round_trip_in_full(name: str, tmp_path: Path) -> None:
    round_trip(FULL[name], tmp_path)


def test_the_width_of_the_hub() -> None:
    assert [EVERY[name].model for name in QUICK] == list(TINY)
    types = {getattr(transformers, it.architecture).config_class.model_type for it in TINY.values()}
    assert len(types) == 73
    for family, least in (
        (ENCODERS, 8), (ENCODER_DECODERS, 5), (VISION, 6), (VISION_LANGUAGE, 9), (AUDIO, 5),
        (RECURRENT, 11),
    ):  # fmt: skip
        assert len({getattr(transformers, it.architecture) for it in family.values()}) >= least
    methods = [EVERY[name].method for name in QUICK]
    assert min(methods.count(method) for method in METHODS) > len(TINY) // 4


def source(model: str, root: Path, dtype: str = "bfloat16") -> Path:
    save(TINY[model].architecture, TINY[model].sizes, root / model, dtype=dtype)
    return root / model


def round_trip(case: Case, root: Path) -> None:
    tiny, quantized = TINY[case.model], root / "quantized"
    request = Request(
        str(source(case.model, root, case.dtype)), case.method, case.options,
        output=quantized, validate=False, device="cpu", threads=1,
    )  # fmt: skip
    planned = convert(request).plan
    assert planned.structure.architecture == tiny.architecture
    stored = open_stored(quantized)
    stored = stored.seen_as(stored.structure())
    plain = loaders.dequantized(stored, getattr(torch, case.dtype), "cpu")
    assert plain.complaints == frozenset()

    cls = getattr(transformers, tiny.architecture)
    model, info = cls.from_pretrained(quantized, dtype="auto", output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    done = {path for path, name in classes.items() if name == CLASSES[case.method]}
    assert done == quantized_modules(planned)
    assert not {*CLASSES.values()} & {name for path, name in classes.items() if path not in done}
    assert model.dtype == getattr(torch, case.dtype)

    ours, theirs = output(plain.model, tiny.inputs), output(model, tiny.inputs)
    assert theirs.isfinite().all()
    assert ours.std() > 0.005  # a model that says the same of everything proves nothing
    error = measure.relative_error(ours, theirs)
    if case.method != "int8":
        assert error <= TOLERANCE[case.dtype]
    elif tiny.inputs == "text" and measure.is_causal(model):
        assert measure.divergence(ours, theirs, inputs("text")["input_ids"]).kl <= INT8_KL
    else:
        assert error <= INT8_ERROR


def output(model: Any, kind: str) -> torch.Tensor:
    """The output that tells most: logits where there are any. float32 [2, …]."""
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs(kind).items()
    }
    with torch.inference_mode():
        out = model.eval()(**given)
    names = ("logits", "logits_per_image", "last_hidden_state")
    found: torch.Tensor = next(out[name] for name in names if name in out)
    return found.float()


# ── what is refused ──────────────────────────────────────────────────────────────────────────

READ = "the model reads its weight instead of calling it"
FLOAT32 = "the model keeps it in float32"
FOUR = "the model calls it with 4 dimensions, and LLM.int8's kernel takes at most 3"
SUBCLASS = "a NonDynamicallyQuantizableLinear, which no loader replaces"
REFUSED = {
    "mamba-nf4": dict.fromkeys(("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"), READ),
    "mamba2-hqq": {"mixer.out_proj": READ},
    "rwkv-int8": {"attention.output": READ, "feed_forward.value": READ},
    "t5-hqq": {"DenseReluDense.wo": FLOAT32},
    "siglip-nf4": {"attention.out_proj": SUBCLASS},
    "wavlm-hqq": {
        **{f"attention.{name}_proj": READ for name in ("k", "out", "q", "v")},
        "attention.gru_rel_pos_linear": "in_features 16 is not a multiple of the group size 64",
    },
    "deepseek-v3-int8": {"self_attn.kv_b_proj": FOUR},
    "deepseek-v3-nf4": {},
    "prophetnet-int8": {"self_attn.out_proj": FOUR, "self_attn.relative_pos_embeddings": FOUR},
    "prophetnet-hqq": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_stays_says_why(name: str, tmp_path: Path) -> None:
    """By the end of its path: each linear layer, heads apart, that is not quantized."""
    case = EVERY[name]
    planned = plan(Request(str(source(case.model, tmp_path)), case.method, case.options))
    roles = planned.structure.roles
    stay = {
        ".".join(roles[entry.tensor.name].module.split(".")[-2:]): entry.reason
        for entry in planned.entries
        if entry.layer is None
        and entry.tensor.name.endswith(".weight")
        and roles[entry.tensor.name].module in planned.structure.modules
        and roles[entry.tensor.name].kind is not Kind.HEAD
    }
    assert stay == REFUSED[name]


FALCON = Tiny(
    "FalconForCausalLM",
    {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "new_decoder_architecture": True, "num_kv_heads": 2,
    },
)  # fmt: skip


@pytest.mark.parametrize(
    ("tiny", "method", "reason"),
    [
        (FALCON, "nf4", "8 × a FalconLinear, which no loader replaces"),
        (TINY["gpt2"], "hqq", "8 × HQQ loaders replace nn.Linear only, and this is a Conv1D"),
        (TINY["convnext"], "int8", f"4 × {FOUR}"),
    ],
    ids=lambda value: value.architecture if isinstance(value, Tiny) else "",
)
def test_a_model_of_which_nothing_can_be_quantized(
    tiny: Tiny, method: str, reason: str, tmp_path: Path
) -> None:
    save(tiny.architecture, tiny.sizes, tmp_path / "source")
    with pytest.raises(UsageError, match="nothing to quantize") as caught:
        plan(Request(str(tmp_path / "source"), method, METHODS[method]))
    assert reason in str(caught.value)


def test_architectures_of_the_table_call_layers_with_three_dimensions() -> None:
    """They are planned without the class: see `linears.input_dimensions`."""
    found: set[int] = set()
    for name in make_architectures.rows():
        dimensions = rehearsal.input_dimensions(make_architectures.config_of(name))
        blocks = [d for path, d in dimensions.items() if path != generalize(path)]
        assert blocks, name
        found |= {d for d in blocks if d > 3}
    assert found == set()


def test_infinity_as_python_and_as_transformers_write_it(tmp_path: Path) -> None:
    """Mamba 2's time_step_limit; published configs have the word that is not JSON."""
    folder = source("mamba2", tmp_path)
    tagged = (folder / "config.json").read_text()
    plain = re.sub(r'\{\s*"__float__": "Infinity"\s*\}', "Infinity", tagged)
    assert "Infinity" in tagged
    assert plain != tagged
    request = Request(str(folder), "nf4", output=tmp_path / "out", validate=False, device="cpu")
    for text, written in ((tagged, '"__float__": "Infinity"'), (plain, " Infinity\n")):
        (folder / "config.json").write_text(text)
        planned = plan(request)
        assert written in planned.generated["config.json"].decode()
        assert len(list(planned.quantized())) == 2
    convert(request)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert list(config.time_step_limit) == [0.0, float("inf")]
    (folder / "config.json").write_text(plain.replace('"chunk_size": 8', '"chunk_size": Infinity'))
    with pytest.raises(UnsupportedConfig, match="chunk_size"):
        plan(request)


@pytest.mark.parametrize("model", ["vit", "whisper"])
def test_what_does_not_read_text_is_not_reloaded(model: str, tmp_path: Path) -> None:
    request = Request(str(source(model, tmp_path)), "nf4", output=tmp_path / "out", validate=False)
    convert(request)
    reload = steps.Reload(tmp_path / "out", None, HELD_OUT, "cpu", 0, 64, lambda _: None)
    with pytest.raises(steps.Impossible, match=r"reads (pixel_values|input_features), and here is"):
        reload.run()
    assert reload.checks == []


# ── the command line's whole way ─────────────────────────────────────────────────────────────

VERDICTS = {
    "roberta-int8": ("verified", ""),
    "bart-nf4": ("verified", ""),
    "llava-hqq": ("verified", ""),
    "mamba2-int8": ("verified", ""),
    "whisper-nf4": ("checked", "reads input_features, and here is text alone"),
    "vit-hqq": ("checked", "reads pixel_values, and here is text alone"),
    "wav2vec2-int8": ("checked", "reads input_values, and here is text alone"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VERDICTS)
def test_the_command_line_ends_with_what_was_proved(name: str, tmp_path: Path) -> None:
    case, (verdict, why) = EVERY[name], VERDICTS[name]
    command = [sys.executable, "-m", "qconvert", case.method, str(source(case.model, tmp_path))]
    options = [f"--{key}={value}" for key, value in case.options.items()]
    done = subprocess.run(
        [*command, *options, "-o", str(tmp_path / "out"), "--device", "cpu"],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"\n{verdict}\n" in done.stdout + done.stderr
    assert why in " ".join((done.stdout + done.stderr).split())
    document = manifest.read(tmp_path / "out")
    assert document is not None
    assert document["validation"]["verdict"] == verdict
    reload = document["validation"]["reports"][-1]
    assert (reload["level"], bool(reload["skipped"])) == ("reload", verdict == "checked")
    assert why in reload["skipped"]
