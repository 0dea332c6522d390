"""What a model calls its blocks with, found out by listening.

Masks, rotary embeddings and position biases are made outside the blocks, once for a batch, and a
block that is run alone must be called with the same. A stub stands in each block's place and notes
the call. Nothing says which of the tensors depend on the batch, so the model is called twice, with
one sample and with two of other tokens: what grew is expanded to any batch size, and whatever then
is not exactly what the model itself passed (tokens in it, a cache, state that blocks share) is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qconvert.errors import UnsupportedConfig, printable

Tensor = Any

_HIDDEN = "hidden_states"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Stub(nn.Module):  # type: ignore[misc]
    """Stands in a block's place: every call goes to `visit(index, args, kwargs)`.

    Has the attributes of the block that it hides, which models look at (`attention_type`), but
    none of its parameters.
    """

    def __init__(self, index: int, block: nn.Module, visit: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(index=index, hidden_block=block, visit=visit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["hidden_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["visit"](self.__dict__["index"], args, kwargs)


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positional: bool
    """The hidden states come first, rather than as `hidden_states=`."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after the block; a tuple's first element is what they are."""
        if self.positional:
            out = block(hidden, *self.args, **self.kwargs)
        else:
            out = block(**{_HIDDEN: hidden}, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a call, and the rest of it."""
    if args:
        return args[0], Call(args[1:], dict(kwargs), True)
    if _HIDDEN not in kwargs:
        raise UnsupportedConfig(f"blocks are called without {_HIDDEN}")
    rest = {key: value for key, value in kwargs.items() if key != _HIDDEN}
    return kwargs[_HIDDEN], Call((), rest, False)


class Calls:
    """The call of every block at one sequence length, for any batch size."""

    def __init__(self, one: Sequence[Call], two: Sequence[Call]) -> None:
        """Calls heard with one sample, and with two samples of other tokens.

        Raises UnsupportedConfig, naming the argument, where the second do not follow.
        """
        self._one = one
        self._growing: dict[int, int] = {}
        """id of a tensor in `one` → the dimension that grows with the batch."""
        for a, b in zip(one, two, strict=True):
            for name, x, y in _pairs(a, b):
                self._compare(name, x, y)

    def call(self, index: int, n: int) -> Call:
        """How block `index` is called with `n` samples."""
        call = self._one[index]
        args, kwargs = (self._expand(part, n) for part in (call.args, call.kwargs))
        return Call(args, kwargs, call.positional)

    def _compare(self, name: str, x: Any, y: Any) -> None:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.ndim == y.ndim and x.shape != y.shape:
                grown = [d for d in range(x.ndim) if y.shape[d] == 2 * x.shape[d]]
                if len(grown) == 1:
                    self._growing[id(x)] = grown[0]
                    x = self._expand(x, 2)
            if not torch.equal(x, y):
                raise _refused(name, "depends on the tokens")
        elif isinstance(x, dict | list | tuple) and type(x) is type(y) and len(x) == len(y):
            if isinstance(x, dict | list) and not x:
                raise _refused(name, "is state that blocks share")
            keys = x.keys() if isinstance(x, dict) else range(len(x))
            for key in keys:
                self._compare(f"{name}[{key!r}]", x[key], y[key])
        elif not (x is y or (isinstance(x, _PLAIN) and type(x) is type(y) and x == y)):
            raise _refused(name, f"is a {type(x).__name__} that differs from call to call")

    def _expand(self, value: Any, n: int) -> Any:
        if isinstance(value, torch.Tensor):
            dim = self._growing.get(id(value))
            if dim is None or n == 1:
                return value
            if value.shape[dim] == 1:
                return value.expand(*(n if d == dim else -1 for d in range(value.ndim)))
            return torch.cat([value] * n, dim)  # [batch x heads, …], as BLOOM's position bias
        if isinstance(value, dict):
            return {key: self._expand(inner, n) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._expand(inner, n) for inner in value)
        return value


def _pairs(a: Call, b: Call) -> Iterator[tuple[str, Any, Any]]:
    """Each argument of two calls of one block, with its name."""
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        raise UnsupportedConfig("a block is called with other arguments for other tokens")
    for i, (x, y) in enumerate(zip(a.args, b.args, strict=True), start=1):
        yield f"argument {i}", x, y
    for name in a.kwargs:
        yield name, a.kwargs[name], b.kwargs[name]


def _refused(name: str, why: str) -> UnsupportedConfig:
    return UnsupportedConfig(
        f"the blocks of this model cannot be run one by one: {printable(name)} {why}"
    )
