"""Makes formats/eetq/golden with the upstream routine, compiled for a CPU.

    git clone https://github.com/NetEase-FuXi/EETQ   # 465e9726bf7ae30803a2d0dd9e5d4315aef17491
    python scripts/make_golden_eetq.py EETQ

`symmetric_quantize` and the four functions that order its codes are plain C++; only their headers
want CUDA. Here stand-ins for those few names take their place (cutlass' tags of layouts and
architectures, `half` as g++'s _Float16, a compute capability that is asked of us), and the
upstream files are compiled as they are, in a temporary folder, with g++ 12 or newer on x86-64.

Each case is a folder: the weight, what upstream makes of its transpose in float16 for compute
capability 8.0 (7.5, 8.6 and 8.9 must give the same, 7.0 must not, 9.0 must be refused), and the
float32 product of its unordered codes with its scales.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent.parent / "formats" / "eetq" / "golden"
KERNELS, EXTENSIONS = "csrc/cutlass_kernels", "csrc/cutlass_extensions/include/cutlass_extensions"
SOURCES = (
    f"{KERNELS}/cutlass_preprocessors.cc",
    f"{KERNELS}/cutlass_preprocessors.h",
    f"{EXTENSIONS}/gemm/kernel/mixed_gemm_B_layout.h",
    f"{EXTENSIONS}/tile_interleaved_layout.h",
)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CASES = {"f16": (64, 64, "F16"), "bf16": (64, 128, "BF16"), "f32": (128, 192, "F32")}
"""Name → out_features, in_features, dtype."""

NAMES = r"""
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>
namespace cutlass {
struct half_t {}; struct bfloat16_t {}; struct uint4b_t {};
template<typename T> struct sizeof_bits { static constexpr int value = sizeof(T) * 8; };
template<> struct sizeof_bits<half_t> { static constexpr int value = 16; };
template<> struct sizeof_bits<bfloat16_t> { static constexpr int value = 16; };
template<> struct sizeof_bits<uint4b_t> { static constexpr int value = 4; };
namespace arch {
struct Sm70 { static constexpr int kMinComputeCapability = 70; };
struct Sm75 { static constexpr int kMinComputeCapability = 75; };
struct Sm80 { static constexpr int kMinComputeCapability = 80; };
struct OpMultiplyAdd {}; struct OpMultiplyAddDequantizeInterleavedBToA {};
}
namespace layout { struct RowMajor {}; struct ColumnMajor {}; }
namespace platform { using std::enable_if; }
}
extern int compute_capability;
namespace fastertransformer {
using half = _Float16;
template<typename... A> std::string fmtstr(const char* format, A... arguments) {
  char text[512]; snprintf(text, sizeof text, format, arguments...); return text;
}
inline int getSMVersion() { return compute_capability; }
}
#define FT_CHECK_WITH_INFO(value, info) \
  do { if (!(value)) throw std::runtime_error(std::string(info)); } while (0)
#define FT_CHECK(value) FT_CHECK_WITH_INFO(value, #value)
"""
DOOR = r"""
#include "cuda_utils.h"
#include "cutlass_preprocessors.h"
int compute_capability;
using namespace fastertransformer;
extern "C" int quantize(int8_t* packed, int8_t* codes, void* scales, const void* weight,
                        size_t rows, size_t columns, int capability) {
  compute_capability = capability;
  try {
    symmetric_quantize<half, half>(packed, codes, (half*)scales, (const half*)weight,
                                   {rows, columns}, QuantType::INT8_WEIGHT_ONLY);
  } catch (const std::exception&) { return 1; }
  return 0;
}
"""
EMPTY = (
    "cutlass/layout/matrix.h", "cutlass/numeric_types.h", "cutlass/arch/arch.h",
    "cutlass/arch/mma.h", "cutlass/platform/platform.h", "cutlass/cutlass.h",
    "cutlass/fast_math.h", "cutlass/matrix_coord.h", "cutlass/pitch_linear_coord.h",
    "cutlass_extensions/arch/mma.h",
)  # fmt: skip


def compiled(checkout: Path, folder: Path) -> ctypes.CDLL:
    """The upstream routine as a library, made in `folder`."""
    files = dict.fromkeys(EMPTY, '#include "cuda_utils.h"\n')
    files |= {"cuda_utils.h": NAMES, "door.cc": DOOR}
    for source in SOURCES:
        name = source.removeprefix(f"{KERNELS}/").removeprefix("csrc/cutlass_extensions/include/")
        files[name] = (checkout / source).read_text("utf-8")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    library = folder / "upstream.so"
    command = ["g++", "-O2", "-std=c++17", "-w", "-fPIC", "-shared", "-I.", "door.cc"]
    subprocess.run([*command, "cutlass_preprocessors.cc", "-o", library], cwd=folder, check=True)
    return ctypes.CDLL(str(library))


def upstream(library: ctypes.CDLL, weight: torch.Tensor, capability: int) -> list[np.ndarray]:
    """Of [out, in]: the ordered codes and the plain ones [in, out], and the scales [out]."""
    transposed = np.ascontiguousarray(weight.to(torch.float16).T.contiguous().numpy())
    rows, columns = transposed.shape
    packed, codes = np.empty((2, rows, columns), np.int8)
    scales = np.empty(columns, np.float16)
    arrays = (packed, codes, scales, transposed)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    sizes = (ctypes.c_size_t(rows), ctypes.c_size_t(columns))
    if library.quantize(*pointers, *sizes, capability):
        raise ValueError(f"refused for compute capability {capability}")
    return [packed, codes, scales]


def sample(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows over six decades; of zeros, of both ends, of ties, of float16's subnormals."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-5, 1, rows).unsqueeze(1)
    weight[3] = 0.0
    weight[3, ::2] = -0.0
    weight[5] *= 1e-2
    ties = (torch.arange(columns) - columns / 2) * 256 / columns + 0.5
    weight[7] = ties / 128
    weight[7, 0], weight[7, 1] = 1.0, -1.0
    weight[8] = -weight[7]
    weight[9, :2] = torch.tensor([65280.0, -65280.0])
    weight[10] = weight[10].abs()
    weight[11] = -weight[11].abs()
    return weight.to(dtype)


def main() -> None:
    checkout = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(checkout, Path(folder))
    hashes = {name: hashlib.sha256((checkout / name).read_bytes()).hexdigest() for name in SOURCES}
    for name, (rows, columns, dtype) in CASES.items():
        weight = sample(rows, columns, DTYPES[dtype])
        packed, codes, scales = upstream(library, weight, 80)
        for capability in (75, 86, 89):
            assert (upstream(library, weight, capability)[0] == packed).all()
        assert (upstream(library, weight, 70)[0] != packed).any()
        with suppress(ValueError):
            upstream(library, weight, 90)
            raise AssertionError("Hopper has become a supported architecture")
        case = GOLDEN / name
        case.mkdir(parents=True, exist_ok=True)
        values = (
            np.ascontiguousarray(codes.T).astype(np.float32) * scales.astype(np.float32)[:, None]
        )
        tensors = {"weight": packed, "weight_scales": scales}
        save_file({"weight": weight}, case / "source.safetensors")
        save_file(
            {k: torch.from_numpy(v.copy()) for k, v in tensors.items()},
            case / "quantized.safetensors",
        )
        save_file({"weight": torch.from_numpy(values)}, case / "dequantized.safetensors")
        facts = {
            "method": "eetq",
            "options": {"bits": 8},
            "dtype": dtype,
            "compute_capability": "8.0; the same for 7.5, 8.6 and 8.9",
            "made_by": {p: version(p) for p in ("torch", "safetensors")},
            "upstream_sha256": hashes,
        }
        (case / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
        for file in case.iterdir():
            file.chmod(0o644)  # safetensors makes its files private (its issue 782)


if __name__ == "__main__":
    main()
