"""The cells that are read: claims about released servers, each held against their wheel's source.

Servers need GPUs, and days to try everything in; which formats they know at all stands in a few
files. A claim names a file of the wheel and what must, or must not, be found in it; `any` is every
Python file. A release that refutes a claim leaves its cell as it was, and the run fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qconvert.matrix import LOADS, NEEDS, NEVER, Seen
from scripts.loader_matrix_files import ROWS, SERVERS

_MAIN = {"vLLM": "vllm", "SGLang": "sglang"}
_UINT8 = r'bnb_4bit_quant_storage not in \["uint8"\]'
_FLAGS = re.I | re.S
_VLLM = "vllm/model_executor/layers/quantization"
_SGLANG = "sglang/srt/layers/quantization"
_WNA16 = "compressed_tensors/schemes/compressed_tensors_wNa16"


@dataclass(frozen=True)
class Claim:
    """What a server makes of the rows whose name begins with `row`."""

    column: str
    package: str
    row: str
    outcome: str
    what: str
    file: str
    present: str = ""
    absent: str = ""
    """Regular expressions, in any case, in which a dot is a line's end too."""


def _no(column: str, package: str, row: str, what: str, file: str) -> Claim:
    return Claim(column, package, row, NEVER, what, file, absent=row.split()[0])


CLAIMS = (
    Claim(
        "vLLM", "vllm-bnb-plugin", "bitsandbytes", NEEDS,
        "vllm-bnb-plugin {version}, which reads uint8 storage alone, without tensor parallelism",
        "vllm_bnb_plugin/quantization/config.py", present=_UINT8,
    ),
    _no("vLLM", "vllm", "hqq", "removed", "any"),
    _no("vLLM", "vllm", "aqlm", "removed in 2025", "any"),
    _no("vLLM", "vllm", "eetq", "never read it", "any"),
    Claim(
        "vLLM", "vllm", "compressed-tensors 4 bits", LOADS,
        "NVIDIA GPUs from Turing on, and CPUs", f"{_VLLM}/{_WNA16}.py",
        present=r"class CompressedTensorsWNA16.*return 75",
    ),
    Claim(
        "vLLM", "vllm", "compressed-tensors 8 bits, symmetric", LOADS,
        "NVIDIA GPUs from Turing on", f"{_VLLM}/{_WNA16}.py",
        present=r"class CompressedTensorsWNA16.*return 75",
    ),
    Claim(
        "vLLM", "vllm", "compressed-tensors 8 bits, zero points", NEEDS,
        "a Hopper GPU, or the package conch-triton-kernels or humming",
        "vllm/model_executor/kernels/linear/mixed_precision/machete.py",
        present=r"requires compute capability of 90 \(Hopper\)",
    ),
    Claim(
        "vLLM", "vllm", "gptq", LOADS,
        "NVIDIA GPUs from Turing on, at 4 bits CPUs; symmetric grids alone",
        f"{_VLLM}/auto_gptq.py", present=r"TYPE_MAP = {\s*\(4, True\)[^}]*\(8, True\)[^,]*,\s*}",
    ),
    Claim(
        "vLLM", "vllm", "awq", LOADS, "NVIDIA GPUs from Turing on, and CPUs",
        f"{_VLLM}/auto_awq.py", present=r"class AutoAWQConfig.*return 75",
    ),
    Claim("vLLM", "vllm", "full precision", LOADS, "", "vllm/config/model.py", present="bfloat16"),
    Claim(
        "SGLang", "sglang", "bitsandbytes", LOADS,
        "uint8 storage alone, without tensor parallelism",
        f"{_SGLANG}/bitsandbytes.py", present=_UINT8,
    ),
    _no("SGLang", "sglang", "hqq", "never read it", f"{_SGLANG}/__init__.py"),
    _no("SGLang", "sglang", "aqlm", "it was vLLM's", f"{_SGLANG}/__init__.py"),
    _no("SGLang", "sglang", "eetq", "never read it", "any"),
    Claim(
        "SGLang", "sglang", "compressed-tensors 4 bits", LOADS,
        "NVIDIA GPUs from Ampere on", f"{_SGLANG}/{_WNA16}.py",
        present=r"class CompressedTensorsWNA16.*return 80",
    ),
    Claim(
        "SGLang", "sglang", "compressed-tensors 8 bits, symmetric", LOADS,
        "NVIDIA GPUs from Ampere on", f"{_SGLANG}/{_WNA16}.py",
        present=r"class CompressedTensorsWNA16.*return 80",
    ),
    Claim(
        "SGLang", "sglang", "compressed-tensors 8 bits, zero points", NEVER,
        "its parser takes them, and no kernel",
        f"{_SGLANG}/marlin_utils.py", present=r"if has_zp:[^:]*return \[scalar_types\.uint4\]",
    ),
    Claim(
        "SGLang", "sglang", "gptq", LOADS,
        "NVIDIA GPUs from Ampere on; symmetric grids alone",
        f"{_SGLANG}/gptq/gptq.py",
        present=r"class GPTQMarlinConfig.*\(4, True\)[^}]*\(8, True\).*return 80",
    ),
    Claim(
        "SGLang", "sglang", "awq", LOADS, "NVIDIA GPUs from Turing on",
        f"{_SGLANG}/awq/awq.py", present=r"class AWQConfig.*Turing or newer.*return 75",
    ),
    Claim("SGLang", "sglang", "full precision", LOADS, "", "sglang/srt/configs/model_config.py",
          present="bfloat16"),
)  # fmt: skip


def cells(only: Sequence[str], work: Path) -> tuple[dict[tuple[str, str], list[Seen]], list[str]]:
    """(row, column) → what was read, and the claims that the newest release refutes."""
    found: dict[tuple[str, str], list[Seen]] = {}
    refuted = []
    wheels: dict[str, Wheel] = {}
    for row, claim in _asked(only):
        for package in (claim.package, _MAIN[claim.column]):
            if package not in wheels:
                wheels[package] = Wheel(package, work / "wheels")
        wheel = wheels[claim.package]
        if why := wheel.refutes(claim):
            refuted.append(f"{row}, {claim.package} {wheel.version}: {why}")
            continue
        where = claim.file if claim.file != "any" else "all Python files"
        today = datetime.now(UTC).date().isoformat()
        versions = (wheels[_MAIN[claim.column]].version,)
        what = claim.what.format(version=wheel.version)
        said = Seen(versions, claim.outcome, what, "read", today, where)
        found[row, claim.column] = [said]
    return found, refuted


def _asked(only: Sequence[str]) -> Iterator[tuple[str, Claim]]:
    for family in ROWS:
        for column in SERVERS:
            if not all(word in f"{family.name} {column}" for word in only):
                continue
            [claim] = [c for c in CLAIMS if c.column == column and family.name.startswith(c.row)]
            yield family.name, claim


class Wheel:
    """The newest wheel of a package, fetched without what it requires."""

    def __init__(self, package: str, folder: Path) -> None:
        name = package.replace("-", "_")
        if not list(folder.glob(f"{name}-*.whl")):
            print(f"fetching {package}", file=sys.stderr, flush=True)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--only-binary", ":all:", "-d", folder, package], check=True)
        [path] = folder.glob(f"{name}-*.whl")
        self._archive = zipfile.ZipFile(path)
        self._files = [it for it in self._archive.namelist() if it.endswith(".py")]
        self.version = path.name.split("-")[1]

    def refutes(self, claim: Claim) -> str:
        """What is found and should not be, or the other way round; or ""."""
        files = self._files if claim.file == "any" else [claim.file]
        if missing := [it for it in files if it not in self._files]:
            return f"no {missing[0]}"
        texts = {it: self._archive.read(it).decode("utf-8", "replace") for it in files}
        if claim.present and not any(re.search(claim.present, t, _FLAGS) for t in texts.values()):
            return f"no {claim.present!r} in {claim.file}"
        for file, text in texts.items():
            if claim.absent and re.search(claim.absent, text, _FLAGS):
                return f"{claim.absent!r} is in {file}"
        return ""
