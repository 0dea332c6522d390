"""A tiny real Llama, roughly quantized: what the tuning stages are tried on.

Also a program: `python -m tests.calibration.tuning FOLDER STEP` tunes with its state in FOLDER and
kills itself after step STEP.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qconvert.calibration.training import Rates
from qconvert.calibration.tune_kl import KLConfig, KLReport, tune_kl
from qconvert.methods.aqlm.module import replace_linears, stored

SEQLEN = 16
RATES = Rates(2e-2, 1e-2, 1e-2)
"""For a few steps on an error that is large."""
KL = KLConfig(
    epochs=2, dtype=torch.bfloat16, batch_tokens=4 * SEQLEN, micro_tokens=2 * SEQLEN, save_every=3,
    min_steps=1, rates=RATES,
)  # fmt: skip


@dataclass
class Model:
    """Full-precision blocks, their quantized twins, and how to run either."""

    model: Any
    exact: list[nn.Module]
    blocks: list[nn.Module]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        del index
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, positions)
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
        out = block(hidden, position_embeddings=rotary, attention_mask=mask)
        assert isinstance(out, Tensor)
        return out

    def run_first(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return self.run(0, block, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.model.norm(hidden))
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def hidden(self, count: int, seed: int, blocks: list[nn.Module]) -> tuple[Tensor, Tensor]:
        """Hidden states before and after `blocks` for `count` random sequences."""
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 256, (count, SEQLEN), generator=g)
        first = out = self.model.model.embed_tokens(ids)
        for i, block in enumerate(blocks):
            out = self.run(i, block, out)
        return first, out

    def values(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": tensor
            for i, block in enumerate(self.blocks)
            for name, tensor in stored(
                block, torch.bfloat16, [n for n, p in block.named_parameters() if p.ndim == 1]
            ).items()
        }


_BF16 = torch.bfloat16


def rough(weight: Tensor, group: int = 4, size: int = 64) -> SimpleNamespace:
    """Two codebooks of vectors picked from the weight and its rest, nearest codes."""
    scales = weight.norm(dim=1).bfloat16().float()
    rest = (weight / scales[:, None]).reshape(-1, group)
    books, codes = [], []
    for _ in range(2):
        book = rest[:: len(rest) // size][:size].bfloat16().float()
        nearest = torch.cdist(rest, book).argmin(1)
        rest = rest - book[nearest]
        books.append(book[:, None])
        codes.append(nearest.reshape(len(weight), -1))
    return SimpleNamespace(
        codes=torch.stack(codes, -1),
        codebooks=torch.stack(books),
        scales=scales[:, None, None, None],
    )


def build() -> Model:
    """The same at every call."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        twin = transformers.LlamaForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    blocks = list(twin.model.layers)
    for block in blocks:
        linears = {p: m for p, m in block.named_modules() if isinstance(m, nn.Linear)}
        replace_linears(block, {p: rough(m.weight.detach()) for p, m in linears.items()}, _BF16)
    return Model(model, list(model.model.layers), blocks)


def tune(model: Model, folder: Path, on_step: Any = None) -> KLReport:
    inputs, targets = model.hidden(24, 1, model.exact)
    return tune_kl(model.blocks, model.run, model.logits, inputs, targets, folder, KL, on_step)


def one_thread() -> Iterator[None]:
    """For a fixture: tensors this small only lose by threads, on busy cores very much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


if __name__ == "__main__":

    def die(step: int, *_: object) -> None:
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    tune(build(), Path(sys.argv[1]), die)
