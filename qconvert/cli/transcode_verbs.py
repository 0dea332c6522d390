"""The verbs that start from a quantized checkpoint: `dequantize`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qconvert import registry
from qconvert.cli import convert_verbs
from qconvert.cli.convert_verbs import WRITING

_Quantized = Annotated[
    str,
    typer.Argument(
        help="A quantized checkpoint: a folder, or a Hub id (org/name).",
        metavar="PATH",
        show_default=False,
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32: what weights are stored in.",
        metavar="DTYPE",
        show_default="what config.json announces",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the application."""
    convert_verbs.add(
        app,
        registry.DEQUANTIZE.verb,
        registry.DEQUANTIZE.summary,
        [("model", _Quantized, ...), ("dtype", _Dtype, None), *WRITING],
        _dequantize,
    )


def _dequantize(given: dict[str, Any]) -> None:
    dtype = convert_verbs.dtype_of(given["dtype"], "--dtype")
    options = {"dtype": dtype} if dtype else {}
    request = convert_verbs.request(registry.DEQUANTIZE.verb, options, given)
    convert_verbs.write(request, given)
