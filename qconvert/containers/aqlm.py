"""The AQLM checkpoint: what `aqlm.QuantizedLinear` holds, and the one scheme in config.json.

A layer is three tensors. `codes` [out_features, in_features / g, M] are numbers of codebook vectors
in two's complement (a code of 2^(B-1) or more is stored less 2^B), `codebooks` [M, 2^B, 1, g] the
vectors themselves, `scales` [out_features, 1, 1, 1] one factor for each row. Codes and scales are
cut by rows; the codebooks belong to all rows and are part of the state that a tile is decoded with.

The scheme stands in config.json, once for the whole model, and so does the list of the layers that
stay as they are. Nothing else tells a loader which those are, and transformers 4 and 5 spell them
differently: a name that is not understood turns a layer into one of uninitialised codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from qconvert.arrays import from_float32, storage_dtype, to_float32, view
from qconvert.containers._rows import row_tiles
from qconvert.errors import CorruptFile, NonFinite, UsageError
from qconvert.lazy import np
from qconvert.methods.aqlm import AQLM
from qconvert.types import (
    FLOAT_DTYPES,
    ITEMSIZE,
    JSON,
    Array,
    Kind,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
)

_PARTS = ("codes", "codebooks", "scales")
_SCHEME = ("num_codebooks", "nbits_per_codebook", "in_group_size")
MAX_EXPERT_NAMES = 1024
"""Expert weights that are listed one by one for transformers 4. transformers 5 compiles every entry
of a list that is longer than the cache of `re` anew for every module: minutes from here on."""


class AQLMContainer:
    """Reads and writes formats/aqlm; implements types.Container."""

    name: ClassVar[str] = "aqlm"

    def variant(self, method: AQLM) -> str:
        return "linear"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: AQLM, max_elements: int) -> Iterator[Tile]:
        """Runs of rows; each is one run of `codes` and one of `scales`."""
        width = layer.in_features
        row = {
            "codes": width // method.in_group_size * method.num_codebooks * _code(method).itemsize,
            "scales": ITEMSIZE[method.compute_dtype],
        }
        return row_tiles(layer.out_features, width, row, max_elements)

    def encode(self, codes: Parts, method: AQLM) -> Parts:
        """A layer, or rows of one, as on disk: any of the three parts.

        `codes`: integers in [0, 2^B), [rows, in_features / g, M]; `codebooks` and `scales`: float32
        [M, 2^B, 1, g] and [rows, 1, 1, 1], rounded to `compute_dtype` here. Raises ValueError for a
        code that is none, NonFinite for a value that is none in that dtype.
        """
        parts: dict[str, Array] = {}
        for name, array in codes.items():
            pack = _pack_codes if name == "codes" else _pack_floats
            parts[name] = pack(name, array, method)
        return parts

    def finish(self, layer: Layer, method: AQLM, kept: Parts) -> Parts:
        return {}

    def quantization_config(self, plan: Plan) -> JSON:
        """As transformers saves it; every layer that stays is listed in both spellings.

        transformers 5 looks for the path of a module, 4 for that of its weight and for nothing
        shorter, so that fused experts are listed one by one, as 4 still builds them.
        """
        method: AQLM = plan.method
        listed: dict[str, None] = {}
        for path in plan.skip_modules:
            listed |= dict.fromkeys((path, f"{path}.weight"))
        listed |= dict.fromkeys(expert_names(plan))
        return {
            "in_group_size": method.in_group_size,
            "linear_weights_not_to_quantize": list(listed),
            "nbits_per_codebook": method.nbits_per_codebook,
            "num_codebooks": method.num_codebooks,
            "out_group_size": 1,
            "quant_method": "aqlm",
        }

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, AQLM]]:
        """The quantized layers by name on disk; the scheme is that of config.json.

        Half a layer is one too: without scales or codebooks the contract check will miss them;
        without codes nothing says how large it was, which raises CorruptFile, as does a scheme
        that makes no sense.
        """
        split = (tensor.rpartition(".") for tensor in tensors)
        names = dict.fromkeys(name for name, _, local in split if local in _PARTS)
        scheme = _scheme(config["quantization_config"]) if names else {}
        return {name: _layer_in(name, tensors, scheme) for name in names}

    def state(self, parts: Parts, layer: Layer, method: AQLM) -> Parts:
        """The codebooks, float32 [M, 2^B, 1, g]."""
        shape = (method.num_codebooks, 2**method.nbits_per_codebook, 1, method.in_group_size)
        return {"codebooks": _floats(parts["codebooks"], method).reshape(shape)}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: AQLM) -> Array:
        rows, width = tile.shape
        codes = view(parts["codes"], _code(method))
        codes = codes.reshape(rows, width // method.in_group_size, method.num_codebooks)
        scales = _floats(parts["scales"], method)
        return method.dequantize(codes, state["codebooks"], scales)


AQLM_CONTAINER = AQLMContainer()


def expert_names(plan: Plan) -> tuple[str, ...]:
    """Weights of experts that stay, as transformers 4 has them, full paths.

    () if they are too many for transformers 5, unless that cannot read the checkpoint anyway.
    """
    experts = [n for n, role in plan.structure.roles.items() if role.kind is Kind.EXPERT]
    quantized = {entry.tensor.name for entry in plan.quantized()}
    names = tuple(name for name in experts if name not in quantized)
    unread = len(names) < len(experts)
    return names if unread or len(names) <= MAX_EXPERT_NAMES else ()


# ── codes and floats ─────────────────────────────────────────────────────────────────────────


def _code(method: AQLM) -> np.dtype[np.generic]:
    return np.dtype(np.int8 if method.nbits_per_codebook <= 8 else np.int16)


def _pack_codes(name: str, codes: Array, method: AQLM) -> Array:
    """Two's complement of `nbits_per_codebook` bits."""
    count = 2**method.nbits_per_codebook
    if codes.size and not 0 <= codes.min() <= codes.max() < count:
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {count})")
    return np.where(codes >= count // 2, codes - count, codes).astype(_code(method))


def _pack_floats(name: str, values: Array, method: AQLM) -> Array:
    with np.errstate(over="ignore"):  # float16 ends at 65,504: seen below
        bits = from_float32(values, method.compute_dtype)
    finite = np.isfinite(values) & np.isfinite(to_float32(bits, method.compute_dtype))
    if bad := int(values.size - np.count_nonzero(finite)):
        raise NonFinite(f"{name}: {bad} values are not finite in {method.compute_dtype}")
    return bits


def _floats(data: Array, method: AQLM) -> Array:
    """On-disk bytes, or an array of them, as a flat float32 array."""
    return to_float32(view(data, storage_dtype(method.compute_dtype)), method.compute_dtype)


# ── other people's folders ───────────────────────────────────────────────────────────────────


def _scheme(config: JSON) -> dict[str, int]:
    """The scheme of `quantization_config`; raises CorruptFile."""
    found = {key: config.get(key) for key in (*_SCHEME, "out_group_size")}
    if any(type(value) is not int for value in found.values()):
        raise CorruptFile(
            "not a scheme of AQLM", file="config.json", expected="four integers", got=found
        )
    if found.pop("out_group_size") != 1:
        raise CorruptFile(
            "out_group_size", file="config.json", expected=1, got=config["out_group_size"]
        )
    try:
        AQLM(**found)  # type: ignore[arg-type]
    except UsageError as error:
        raise CorruptFile(f"not a scheme of AQLM: {error}", file="config.json") from error
    return found  # type: ignore[return-value]


def _layer_in(
    name: str, tensors: Mapping[str, TensorInfo], scheme: Mapping[str, int]
) -> tuple[Layer, AQLM]:
    codes = tensors.get(f"{name}.codes")
    if codes is None or len(codes.shape) != 3:
        raise CorruptFile(
            f"no tensor {name}.codes" if codes is None else "not codes of AQLM",
            file=codes.file if codes else "",
            tensor=f"{name}.codes",
            expected="three dimensions",
            got="nothing" if codes is None else list(codes.shape),
        )
    floats = (tensors.get(f"{name}.{part}") for part in ("codebooks", "scales"))
    dtypes = [info.dtype for info in floats if info is not None and info.dtype in FLOAT_DTYPES]
    method = AQLM(**scheme, compute_dtype=dtypes[0] if dtypes else "F16")
    shape = (codes.shape[0], codes.shape[1] * method.in_group_size)
    if min(shape) < 1:
        raise CorruptFile("codes of no weight", file=codes.file, tensor=codes.name)
    weight = TensorInfo(f"{name}.weight", method.compute_dtype, shape, codes.file, 0, 0)
    layer = Layer(name, name, weight, *shape, has_bias=f"{name}.bias" in tensors)
    return layer, method
