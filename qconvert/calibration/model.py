"""A model of which one block is in memory at a time.

The class of transformers is built on the meta device; every decoder block is replaced by a stub,
and the rest (embeddings, positions, final norm, head) is loaded. Calling *that* model is the whole
trick: what reaches the first stub are the inputs of the first block, what a stub is called with
(masks, rotary embeddings) is what its block must be called with, and a model whose first stub
answers with the last block's output ends in the true logits. Scaled embeddings, soft-capped
logits, sliding windows: whatever a class does around its blocks, it does itself.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from qconvert.blocks import Blocks
from qconvert.types import Array, Checkpoint, Structure

Tensor = Any


class BlockModel:
    """A checkpoint run block by block; a context manager that holds its files open.

    Hidden states are [n, seqlen, hidden] on `device` in `dtype`, which is computed in (on
    a CPU: float32). Nothing is loaded before it is needed; what lies outside the blocks then stays.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        blocks: Blocks,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        """Raises as `skeleton.build` does."""
        raise NotImplementedError

    def __enter__(self) -> BlockModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that travel from block to block."""
        raise NotImplementedError

    def linears(self, index: int) -> dict[str, str]:
        """Path relative to block `index` → name on disk without ".weight", in module order.

        Every nn.Linear with a tensor of its own; the plan decides which are quantized.
        """
        raise NotImplementedError

    def parameters(self, index: int) -> dict[str, str]:
        """Parameter relative to block `index` ("input_layernorm.weight") → name on disk.

        Those that lie on disk as they are in memory: not fused experts.
        """
        raise NotImplementedError

    def embed(self, ids: Array) -> Tensor:
        """Inputs of block 0 for token ids [n, seqlen] (integers); no gradients."""
        raise NotImplementedError

    def load(self, index: int) -> nn.Module:
        """Block `index` with its full-precision weights, on the device, in eval mode, frozen.

        A new module each time, which the caller may change and must drop. Raises SourceError.
        """
        raise NotImplementedError

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after `block` in the place of block `index`; gradients flow.

        Any batch size and seqlen: masks and positions are found out once for each seqlen.
        Raises UnsupportedConfig where they depend on the tokens, or blocks share state.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, seqlen, vocab] of the hidden states after the last block; gradients flow.

        Raises UnsupportedConfig for a class without a language model's head.
        """
        raise NotImplementedError
