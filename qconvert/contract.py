"""The on-disk contracts of formats/, read as data.

`formats/<name>/tensors.json` says, for each variant of a format, which tensors one linear layer
becomes: local name, dtype, shape formula, constant value. The planner computes sizes from it, the
writer and the validator check against it, and FORMAT.md's tables are generated from it, so the
four cannot drift apart.

A format of another package is a folder of the same kind, which its `FormatInfo` names; see
`extensions.py`.

Formulas are Python expressions over the layer's and the method's numbers (`out_features`,
`in_features`, `group_size`, …). They are evaluated by a walker that knows integers, names,
arithmetic, comparisons and conditionals, and nothing else: a contract folder may come from a
third party, and data must not become code.
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from qconvert import extensions
from qconvert.errors import UsageError
from qconvert.extensions import Extension, Unusable
from qconvert.types import Container, Layer, Method, TensorSpec

Value = int | float | str | bool | None
Env = Mapping[str, Value]

_MAX_EXPONENT = 64


def _power(base: Any, exponent: Any) -> Any:
    """A power that cannot be used to fill the memory."""
    if not 0 <= exponent <= _MAX_EXPONENT:
        raise ValueError(f"exponent {exponent} in a contract formula")
    return base**exponent


_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def evaluate(formula: str, env: Env) -> Any:
    """The value of a contract formula, such as `-(-out_features * in_features // blocksize)`."""
    return _walk(_parse(formula), env, formula)


@cache
def _parse(formula: str) -> ast.expr:
    return ast.parse(formula, mode="eval").body


def _walk(node: ast.expr, env: Env, formula: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Name(id=name) if name in env:
            return env[name]
        case ast.Name(id=name):
            raise ValueError(f"unknown name {name!r} in contract formula {formula!r}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_walk(operand, env, formula)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _walk(operand, env, formula)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, env, formula), _walk(right, env, formula))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, env, formula), _walk(right, env, formula))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_walk(value, env, formula) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_walk(value, env, formula) for value in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _walk(body if _walk(test, env, formula) else orelse, env, formula)
    raise ValueError(f"not allowed in a contract formula: {ast.dump(node)} in {formula!r}")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of a variant, as tensors.json states it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str
    when: str = "True"
    value: Any = None
    """A constant: number, or text stored as its UTF-8 bytes; None if it depends on the weight."""

    def spec(self, env: Env) -> TensorSpec:
        dtype = str(env.get(self.dtype, self.dtype))  # a dtype may be a name of the environment
        shape = tuple(d if isinstance(d, int) else int(evaluate(d, env)) for d in self.shape)
        return TensorSpec(self.name.format_map(env), dtype, shape)


@dataclass(frozen=True, slots=True)
class Band:
    """Bounds of the relative error ‖w-ŵ‖/‖w‖: of a whole tensor, and of its worst group.

    A gain is ⟨w,ŵ⟩/⟨w,w⟩: that of the whole tensor, and that of each group over the tensor's.
    """

    low: float
    high: float
    group_high: float
    gain_low: float = -math.inf
    gain_high: float = math.inf
    whole_gain_low: float = -math.inf
    whole_gain_high: float = math.inf


_BAND_KEYS = {field.name for field in fields(Band)}


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """A format of another package: what an entry point of the group `qconvert.formats` names.

    The entry point's name is that of the container, and `quant_method` in config.json.
    """

    folder: Path
    """With tensors.json, quantization_config.schema.json, FORMAT.md and USAGE.md."""
    container: str
    """`module:SINGLETON` that implements types.Container."""
    loader: str = ""
    """`module:callable` that the reload level calls with (folder, dtype=, device=).

    dtype is torch's, device "cpu" or "cuda". It returns the model and what `from_pretrained` calls
    its loading info: a mapping with missing_keys, unexpected_keys, mismatched_keys and error_msgs.
    """


class Contract:
    """formats/<name>: what its loaders read. `added` is None unless another package brings it."""

    def __init__(self, name: str, root: Path, added: Extension | None = None) -> None:
        self.name = name
        self.root = root
        self.added = added
        self.data: dict[str, Any] = json.loads((root / "tensors.json").read_text("utf-8"))

    @property
    def variants(self) -> Mapping[str, Any]:
        variants: Mapping[str, Any] = self.data["variants"]
        return variants

    @property
    def dtype(self) -> str | None:
        """What everything that is not quantized is stored in, or None: as config.json says."""
        dtype: str | None = self.data.get("dtype")
        return dtype

    @property
    def caution(self) -> str:
        """What whoever chooses this format must know beforehand, or ""."""
        caution: str = self.data.get("caution", "")
        return caution

    @property
    def no_reload(self) -> str:
        """Why no loader can be tried in a process without a network, or ""."""
        reason: str = self.data.get("no_reload", "")
        if self.added is not None and not self.loader:
            reason = reason or f"{self.added.package} names no loader of {self.name}"
        return reason

    @property
    def libraries(self) -> Sequence[str]:
        """The packages, as pip names them, with which transformers reads it."""
        ours = self.added is None and self.variants
        found: Sequence[str] = self.data.get("libraries", [self.name] if ours else [])
        return found

    @property
    def loader(self) -> str:
        """The loader of a format that another package brings, as `FormatInfo.loader`; else ""."""
        return self.added.value.loader if self.added is not None else ""

    @property
    def experts(self) -> Mapping[str, Any]:
        """What its loaders make of experts, one by one on disk: see `qconvert.mixture`.

        refused: why they cannot be quantized; kept: why they cannot be left; symmetric: why their
        zeros are to be in the middle; alike: why all have the same options; unread: why
        transformers 5 does not load quantized ones; loaders: who does.
        """
        found: Mapping[str, Any] = self.data.get("experts", {})
        return found

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of `quantization_config`."""
        text = (self.root / "quantization_config.schema.json").read_text("utf-8")
        schema: dict[str, Any] = json.loads(text)
        return schema

    def rules(self, variant: str, env: Env) -> Iterator[TensorRule]:
        """The tensors of a variant that exist under these options."""
        for rule in self.variants[variant]["tensors"]:
            parsed = TensorRule(**{**rule, "shape": tuple(rule["shape"])})
            if evaluate(parsed.when, env):
                yield parsed

    def specs(self, variant: str, env: Env) -> tuple[TensorSpec, ...]:
        """Local names, dtypes and shapes of what one layer becomes.

        `env` holds out_features, in_features and the method's numbers (the variant's
        "parameters" lists which).
        """
        return tuple(rule.spec(env) for rule in self.rules(variant, env))

    def refusal(self, variant: str, env: Env) -> str | None:
        """Why a layer of this shape cannot be stored, or None."""
        for rule in self.variants[variant].get("requires", ()):
            if not evaluate(rule["expr"], env):
                reason: str = rule["reason"].format_map(env)
                return reason
        return None

    def asks(self, variant: str, name: str) -> bool:
        """Whether it depends on `name` what can be stored."""
        return any(name in rule["expr"] for rule in self.variants[variant].get("requires", ()))

    def band(self, variant: str, env: Env) -> Band:
        """The error expected of this variant under these options."""
        for row in self.variants[variant]["error"]:
            if evaluate(row.get("when", "True"), env):
                return Band(**{key: row[key] for key in _BAND_KEYS & row.keys()})
        raise ValueError(f"formats/{self.name}: no error band for {variant} with {dict(env)}")


def environment(layer: Layer, method: Method) -> Env:
    """The names that a contract's formulas may use: the layer's shape and the method's options."""
    return {
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "transposed": layer.transposed,
        "input_dimensions": layer.input_dimensions,
        **method.options(),
    }


def refusal(container: Container, layer: Layer, method: Method) -> str | None:
    """Why a container cannot hold this layer with these options, or None."""
    return load(container.name).refusal(container.variant(method), environment(layer, method))


def formats_root() -> Path:
    """The formats folder: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    for candidate in (package / "formats", package.parent / "formats"):
        if (candidate / "README.md").is_file():
            return candidate
    raise FileNotFoundError("the formats folder is missing from this installation")


def names() -> list[str]:
    """Every built-in format, sorted."""
    return sorted(p.parent.name for p in formats_root().glob("*/tensors.json"))


def all_names() -> list[str]:
    """Every format that can be used here, those of other packages last."""
    return [*names(), *(it.name for it in added().values() if not it.problem)]


@cache
def added() -> Mapping[str, Extension]:
    """The formats of other packages, and those that cannot be used, by name."""
    found = extensions.load(extensions.FORMATS, names(), _check_added)
    return {it.name: it for it in reversed(found)}  # those in use come first, and win


def load_added(name: str) -> Container | None:
    """The container of a format of another package, or None if no package has that name."""
    if name not in extensions.names(extensions.FORMATS):  # does not import any of them
        return None
    return _container(load(name))


@cache
def load(name: str) -> Contract:
    """The contract of a format; raises UsageError for an unknown name."""
    root = formats_root() / name
    if (root / "tensors.json").is_file():
        return Contract(name, root)
    if name not in extensions.names(extensions.FORMATS):
        raise UsageError(f"unknown format {name!r}", hint="qconvert formats")
    found = added()[name]
    if found.problem:
        raise UsageError(f"{found} cannot be used: {found.problem}", hint="qconvert doctor")
    return Contract(name, found.value.folder, found)


_FILES = ("tensors.json", "quantization_config.schema.json", "FORMAT.md", "USAGE.md")
_KEYS = {"quant_method", "skip_list", "loaders", "variants"}
_VARIANT_KEYS = {"layer_class", "tensors", "error", "kl"}


def _check_added(name: str, value: Any) -> None:
    """Raises Unusable for what is no format, or is one whose folder lacks something."""
    if not isinstance(value, FormatInfo):
        raise Unusable(f"expected a qconvert.contract.FormatInfo, got {type(value).__name__}")
    if missing := [file for file in _FILES if not (value.folder / file).is_file()]:
        raise Unusable(f"{value.folder} has no {' and no '.join(missing)}")
    data = Contract(name, value.folder).data
    if missing := sorted(_KEYS - data.keys()):
        raise Unusable(f"tensors.json has no {', '.join(missing)}")
    if data["quant_method"] != name or not data["variants"]:
        raise Unusable(f"tensors.json is of no format {name} that has variants")
    for variant, says in data["variants"].items():
        if missing := sorted(_VARIANT_KEYS - says.keys()):
            raise Unusable(f"variant {variant} in tensors.json has no {', '.join(missing)}")


def _container(of: Contract) -> Container:
    """That of a format of another package; raises UsageError if there is none."""
    assert of.added is not None
    try:
        found: Container = extensions.resolve(of.added.value.container)
        if found.name != of.name:
            raise Unusable(f"its container calls itself {found.name}")
    except Exception as error:
        raise UsageError(
            f"{of.added} cannot be used: {extensions.in_words(error)}", hint="qconvert doctor"
        ) from error
    return found
