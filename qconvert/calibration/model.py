"""A model of which one block is in memory at a time.

The class of transformers is built on the meta device; every decoder block is replaced by a stub,
and the rest (embeddings, positions, final norm, head) is loaded. Calling *that* model is the whole
trick: what reaches the first stub are the inputs of the first block, what a stub is called with
(masks, rotary embeddings) is what its block must be called with, and a model whose first stub
answers with the last block's output ends in the true logits. Scaled embeddings, soft-capped
logits, sliding windows: whatever a class does around its blocks, it does itself.

What a class does *between* its blocks cannot be heard this way, so it must do nothing: each stub
has to be given what the one before it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from qconvert import skeleton
from qconvert.arrays import to_torch
from qconvert.blocks import Blocks, block_of
from qconvert.calibration import calls, weights
from qconvert.calibration.calls import Call, Calls, Stub
from qconvert.calibration.experts import Apart
from qconvert.errors import UnsupportedConfig, printable
from qconvert.source import SourceReader
from qconvert.stored import read_tensor
from qconvert.types import Array, Checkpoint, Kind, Structure

Tensor = Any
Visit = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


class BlockModel:
    """A checkpoint run block by block; a context manager that holds its files open.

    Hidden states are [n, seqlen, hidden] on `device` in `dtype`, which is computed in (on a CPU:
    float32). What lies outside the blocks is loaded when it is first needed, and stays.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        blocks: Blocks,
        device: str,
        dtype: torch.dtype,
        apart: Collection[str] = (),
    ) -> None:
        """`apart`: paths in memory of fused experts that are to be linear layers, one by one.

        Raises as `skeleton.build` does, and UnsupportedConfig where blocks share weights or there
        are more of them than the checkpoint holds, or where experts cannot be told apart.
        """
        self.blocks, self.device, self.dtype = blocks, device, dtype
        self._checkpoint, self._structure = checkpoint, structure
        self._model = skeleton.build(checkpoint.config, dtype)
        self._known = skeleton.in_memory(self._model, checkpoint.tensors)
        self._stack: nn.ModuleList = self._model.get_submodule(blocks.prefix)
        if len(self._stack) != blocks.count:
            raise UnsupportedConfig(
                f"blocks of {type(self._model).__name__}",
                expected=len(self._stack), got=blocks.count,
            )  # fmt: skip
        for pair in self._model.all_tied_weights_keys.items():
            if any(block_of(blocks, name) is not None for name in pair):
                raise UnsupportedConfig(f"blocks share weights: {' and '.join(pair)}")
        self._apart = {path: Apart(self._model, path, structure, self._known) for path in apart}
        for config in (self._model.config, self._model.config.get_text_config()):
            for option in ("use_cache", *_EXTRA_OUTPUTS):
                setattr(config, option, False)
        self._meta = list(self._stack)
        self._visit: Visit | None = None
        for index, block in enumerate(self._meta):
            self._stack[index] = Stub(index, block, self._visited)
        self._calls_at: dict[int, Calls] = {}
        self._tuples = False
        """The class takes a block's output to be a tuple that begins with the hidden states."""
        self._filled = False
        self._reader = SourceReader(checkpoint)

    def __enter__(self) -> BlockModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that travel from block to block."""
        return int(self._model.config.get_text_config().hidden_size)

    # ── names ────────────────────────────────────────────────────────────────────────────────

    def linears(self, index: int) -> dict[str, str]:
        """Path relative to block `index` → name on disk without ".weight", in the model's order.

        Every nn.Linear with a tensor of its own; the plan decides which are quantized.
        """
        found: dict[str, str] = {}
        for path, module in self._meta[index].named_modules():
            where = f"{self.blocks.prefix}.{index}.{path}"
            if (experts := self._apart.get(where)) is not None:
                found |= {f"{path}.{inside}": stem for inside, stem in experts.stems.items()}
            stem = self._structure.modules.get(where)
            if stem is not None and isinstance(module, nn.Linear):
                role = self._structure.roles.get(f"{stem}.weight")
                if role is not None and role.kind is Kind.LINEAR:
                    found[path] = stem
        return found

    def parameters(self, index: int) -> dict[str, str]:
        """Parameter relative to block `index` ("input_layernorm.weight") → name on disk.

        Those that lie on disk as they are in memory: not fused experts.
        """
        prefix = f"{self.blocks.prefix}.{index}."
        return {
            target.removeprefix(prefix): name
            for name, (target, converted) in self._known.items()
            if target.startswith(prefix) and not converted
        }

    # ── running ──────────────────────────────────────────────────────────────────────────────

    def embed(self, ids: Array) -> Tensor:
        """Inputs of block 0 for token ids [n, seqlen] (integers); no gradients.

        Raises UnsupportedConfig as `run` does, so that a refusal comes before the work.
        """
        self._calls(ids.shape[1])

        def visit(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _Heard(calls.split(args, kwargs)[0])

        with torch.no_grad():
            return self._forward(torch.as_tensor(ids, dtype=torch.long, device=self.device), visit)

    def load(self, index: int) -> nn.Module:
        """Block `index` with its full-precision weights, on the device, in eval mode, frozen.

        A new module each time, which the caller may change and must drop. Raises SourceError, and
        UnsupportedConfig where experts apart do not answer as they do fused.
        """
        self._fill_outside()
        block: nn.Module = deepcopy(self._meta[index])
        stub, self._stack[index] = self._stack[index], block
        try:
            self._fill(block, index)
        finally:
            self._stack[index] = stub
        for path, experts in self._apart.items():
            if block_of(self.blocks, path) == index:
                inside = path.removeprefix(f"{self.blocks.prefix}.{index}.")
                block.set_submodule(inside, experts.of(block.get_submodule(inside), self._read))
        return block

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after `block` in the place of block `index`; gradients flow.

        Any batch size and seqlen: masks and positions are found out once for each seqlen.
        Raises UnsupportedConfig where they depend on the tokens, or blocks share state.
        """
        return self._calls(hidden.shape[1]).call(index, len(hidden))(block, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, seqlen, vocab] of the hidden states after the last block; gradients flow.

        Raises UnsupportedConfig for a class without a language model's head.
        """
        self._calls(hidden.shape[1])

        def visit(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._answer(hidden if index == 0 else calls.split(args, kwargs)[0])

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        logits = getattr(self._forward(ids, visit), "logits", None)
        if logits is None or logits.shape[:-1] != hidden.shape[:-1]:
            raise UnsupportedConfig(f"{type(self._model).__name__} has no head that gives logits")
        return logits

    # ── listening ────────────────────────────────────────────────────────────────────────────

    def _forward(self, ids: Tensor, visit: Visit) -> Any:
        """The model's own forward with `visit` in the place of every block."""
        self._fill_outside()
        self._visit = visit
        try:
            return self._model(input_ids=ids, return_dict=True)
        except _Heard as heard:
            return heard.result
        finally:
            self._visit = None

    def _visited(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._visit is not None
        return self._visit(index, args, kwargs)

    def _answer(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden

    def _calls(self, seqlen: int) -> Calls:
        if seqlen not in self._calls_at:
            vocab = self._model.get_input_embeddings().num_embeddings
            ids = (torch.arange(seqlen)[None, :] + torch.arange(3)[:, None]) % vocab
            one, two = ids.to(self.device).split([1, 2])
            self._fill_outside()
            with torch.no_grad():
                self._calls_at[seqlen] = Calls(self._listen(one), self._listen(two))
        return self._calls_at[seqlen]

    def _listen(self, ids: Tensor) -> list[Call]:
        """The call of every block; finds out which form of output the class expects of them."""
        reasons: list[Exception] = []
        for tuples in (self._tuples, not self._tuples):
            self._tuples = tuples
            try:
                return self._listen_once(ids)
            except torch.OutOfMemoryError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                reasons.append(error)
        raise UnsupportedConfig(
            f"the blocks of {type(self._model).__name__} cannot be run one by one: "
            f"{type(reasons[0]).__name__}: {printable(reasons[0])}"
        ) from reasons[0]

    def _listen_once(self, ids: Tensor) -> list[Call]:
        heard: list[Call] = []
        before: Tensor = None

        def visit(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal before
            hidden, call = calls.split(args, kwargs)
            if index != len(heard):
                raise ValueError(f"block {index} is called after {len(heard)} others")
            if heard and not (hidden is before or torch.equal(hidden, before)):
                raise ValueError(f"block {index} is not given what block {index - 1} returned")
            heard.append(call)
            before = hidden
            if len(heard) == self.blocks.count:
                raise _Heard(heard)
            return self._answer(hidden)

        self._forward(ids, visit)
        if len(heard) != self.blocks.count:
            raise ValueError(f"{len(heard)} of {self.blocks.count} blocks are called")
        return heard

    # ── weights ──────────────────────────────────────────────────────────────────────────────

    def _fill_outside(self) -> None:
        if not self._filled:
            self._fill(self._model, None)
            self._filled = True

    def _fill(self, part: nn.Module, index: int | None) -> None:
        """Loads block `index`, or with None all that belongs to no block."""
        tensors = [
            self._checkpoint.tensors[name]
            for name, (target, _) in self._known.items()
            if block_of(self.blocks, target) == index
        ]
        weights.fill(self._model, part, tensors, self._reader, self.device, self.dtype)

    def _read(self, name: str) -> Tensor:
        """A tensor on disk, as it is in memory."""
        info = self._checkpoint.tensors[name]
        tensor = to_torch(read_tensor(self._reader, info), info.dtype)
        return tensor.to(self.device, self.dtype)


_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
"""What a config may ask of every forward pass: stubs have none of it."""


class _Heard(Exception):
    """Ends a forward pass when what was listened for has been heard."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result
