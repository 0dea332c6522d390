"""The rows of the matrix: what is converted from the demo model, quickly, and by which names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconvert.calibration.options import CalibrationOptions
from qconvert.conversion import Request, convert

TRANSFORMERS = ("transformers 4.56", "transformers 4.57", "transformers 5")
HQQ = "hqq library"
SERVERS = ("vLLM", "SGLang")
COLUMNS = (*TRANSFORMERS, HQQ, *SERVERS)


@dataclass(frozen=True)
class File:
    """A checkpoint: its short name in its row, and the options that make it."""

    name: str
    verb: str
    options: dict[str, Any] = field(default_factory=dict)
    skip: str | None = None


@dataclass(frozen=True)
class Family:
    """A row."""

    name: str
    format: str
    files: tuple[File, ...]


def _hqq(bits: int, axis: int = 1) -> File:
    name = f"{bits} bits" + ("" if axis else ", axis 0")
    return File(name, "hqq", {"bits": bits, "axis": axis})


def _packed(bits: int, zero: str, group_size: int) -> File:
    size = "a row" if group_size < 0 else f"groups of {group_size}"
    options = {"container": "compressed-tensors", "bits": bits, "zero": zero}
    return File(size, "hqq", {**options, "group_size": group_size})


def _striped(container: str, bits: int, group_size: int) -> File:
    size = "a row" if group_size < 0 else f"groups of {group_size}"
    options = {"container": container, "bits": bits, "group_size": group_size}
    return File(f"{bits} bits, {size}", "hqq", options)


def _aqlm(scheme: str) -> File:
    return File(scheme, "aqlm", {"scheme": scheme, "quality": "fast"}, skip=r"layers\.[1-9]\.")


ROWS = (
    Family("bitsandbytes int8", "bitsandbytes", (File("int8", "int8"),)),
    Family(
        "bitsandbytes nf4, fp4",
        "bitsandbytes",
        tuple(
            File(f"{verb}{', double quantization' if double else ''}", verb,
                 {"double_quant": double})
            for verb in ("nf4", "fp4") for double in (True, False)
        ),
    ),
    Family(
        "hqq 8 to 1 bits", "hqq", (*map(_hqq, (8, 6, 5, 4, 3, 2, 1)), _hqq(4, 0), _hqq(3, 0))
    ),
    Family("eetq 8 bits", "eetq", (File("8 bits", "eetq"),)),
    Family("aqlm 1x16g8", "aqlm", (_aqlm("1x16g8"),)),
    Family("aqlm 2x8g8", "aqlm", (_aqlm("2x8g8"),)),
    Family(
        "compressed-tensors 4 bits, symmetric", "compressed-tensors",
        (_packed(4, "middle", 64), _packed(4, "middle", 128), _packed(4, "middle", -1)),
    ),
    Family(
        "compressed-tensors 4 bits, zero points", "compressed-tensors",
        (_packed(4, "integer", 64), _packed(4, "integer", 32), _packed(4, "integer", -1)),
    ),
    Family(
        "compressed-tensors 8 bits, symmetric", "compressed-tensors",
        (
            _packed(8, "middle", 64),
            File("int8", "int8", {"container": "compressed-tensors"}),
        ),
    ),
    Family(
        "compressed-tensors 8 bits, zero points", "compressed-tensors",
        (_packed(8, "integer", 64), _packed(8, "integer", -1)),
    ),
    Family(
        "gptq 4 and 8 bits", "gptq",
        (
            _striped("gptq", 4, 64), _striped("gptq", 4, 128), _striped("gptq", 8, 64),
            _striped("gptq", 8, -1),
        ),
    ),
    Family("awq 4 bits", "awq", (_striped("awq", 4, 32), _striped("awq", 4, 64))),
    Family("full precision", "plain", (File("of nf4", "dequantize"),)),
)  # fmt: skip


def made(family: Family, file: File, work: Path) -> Path:
    """The folder of a checkpoint, converted if it is not there yet."""
    folder = work / f"{family.name} {file.name}".replace(" ", "-").replace(",", "")
    if folder.exists():
        return folder
    source = "demo"
    if file.verb == "dequantize":
        source = str(made(ROWS[1], ROWS[1].files[0], work))
    quick = CalibrationOptions(nsamples=8, seqlen=128, epochs=0) if file.verb == "aqlm" else None
    convert(
        Request(
            source, file.verb, file.options, output=folder, skip=file.skip, calibration=quick,
            device="cpu", validate=False,
        )
    )  # fmt: skip
    return folder
