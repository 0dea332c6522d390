"""The verbs that start from a quantized checkpoint: `dequantize` and `transcode`."""

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
_To = Annotated[
    str,
    typer.Option(
        help=f"The format to store it in: {', '.join(registry.formats())}.",
        metavar="FORMAT",
        show_default=False,
    ),
]
_Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize", help="Quantize once more where codes cannot be kept: errors add up."
    ),
]
_Bits = Annotated[
    int | None,
    typer.Option(help="With --requantize.", metavar="N", show_default="the source's"),
]
_GroupSize = Annotated[
    int | None,
    typer.Option(help="With --requantize.", metavar="N", show_default="the source's"),
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
    convert_verbs.add(
        app,
        registry.TRANSCODE.verb,
        registry.TRANSCODE.summary,
        [
            ("model", _Quantized, ...),
            ("to", _To, ...),
            ("requantize", _Requantize, False),
            ("bits", _Bits, None),
            ("group_size", _GroupSize, None),
            *WRITING,
        ],
        _transcode,
    )


def _dequantize(given: dict[str, Any]) -> None:
    dtype = convert_verbs.dtype_of(given["dtype"], "--dtype")
    options = {"dtype": dtype} if dtype else {}
    request = convert_verbs.request(registry.DEQUANTIZE.verb, options, given)
    convert_verbs.write(request, given)


def _transcode(given: dict[str, Any]) -> None:
    from qconvert.transcoding import resolved

    asked = {key: given[key] for key in ("to", "requantize", "bits", "group_size")}
    request = resolved(convert_verbs.request(registry.TRANSCODE.verb, asked, given))
    convert_verbs.write(request, given)
