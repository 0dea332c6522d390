"""Comparisons made by hand, for what is drawn and written of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qconvert.comparing.result import SOURCE, Comparison, Row, Sample

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = tuple(f"model.layers.{block}.{kind}" for block in range(3) for kind in KINDS)


def row(name: str, bits: float, kl: float, **more: Any) -> Row:
    """A format whose first block's first layer was kept."""
    found = Row(
        name=name,
        method=f"{name}, bits 4",
        bits=bits,
        layer_bits=bits - 1,
        nbytes=int(1e6 * bits),
        loaded_bytes=int(1.1e6 * bits),
        seconds=3.5,
        perplexity=12.5,
        kl=kl,
        kl_error=kl / 20,
        top1=0.9,
        weight_error=kl,
        prompt_rate=120.0,
        decode_rate=12.0,
        samples=(Sample("How to", " go there\nand back", 6, 2),),
        layers={layer: 0.01 * (1 + at) for at, layer in enumerate(LAYERS[1:])},
        loader="a loader",
        notes=("a note",),
    )
    return replace(found, **more)


def comparison(*rows: Row, **more: Any) -> Comparison:
    """The rows and their source."""
    source = Row(
        name=SOURCE,
        bits=16.0,
        nbytes=16_000_000,
        perplexity=12.0,
        kl=0.0,
        top1=1.0,
        samples=(Sample("How to", " go home", 6, 6),),
    )
    about: Mapping[str, Any] = {
        "model": "org/model", "revision": "0" * 40, "parameters": 8_000_000, "layers": LAYERS,
        "device": "cpu", "device_name": "a processor", "threads": 2, "dtype": "bfloat16",
        "text": "held-out text", "tokens": 2048, "prompt_tokens": 512,
    }  # fmt: skip
    return Comparison(rows=(source, *rows), **{**about, **more})


def ordinary() -> Comparison:
    """Five formats, one of them beaten by another in both."""
    return comparison(
        row("int8", 8.1, 0.0003),
        row("hqq:4", 4.5, 0.03),
        row("nf4", 4.6, 0.04),
        row("hqq:3", 3.7, 0.12),
        row("hqq:2", 2.6, 1.9),
    )
