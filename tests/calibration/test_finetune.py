"""Block-wise fine-tuning: it helps on what it has not seen, and it never harms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qconvert.calibration import training
from qconvert.calibration.activations import Activations, writing
from qconvert.calibration.finetune import FinetuneConfig, FinetuneReport, finetune_block
from qconvert.calibration.training import Rates, batch_sizes, shuffled, split, warm_cosine
from qconvert.methods.aqlm.module import aqlm_layers
from tests.calibration import tuning
from tests.calibration.tuning import SEQLEN, Model, same

CONFIG = FinetuneConfig(
    epochs=3, dtype=torch.bfloat16, batch_tokens=4 * SEQLEN, micro_tokens=4 * SEQLEN,
    min_steps=1, rates=tuning.RATES,
)  # fmt: skip
WILD = Rates(3.0, 3.0, 3.0)


_one_thread = pytest.fixture(autouse=True, scope="module")(tuning.one_thread)


@pytest.fixture
def model() -> Model:
    return tuning.build()


def tune(model: Model, config: FinetuneConfig = CONFIG, **how: object) -> FinetuneReport:
    inputs, targets = model.hidden(32, 1, model.exact[:1])
    run = how.pop("run", model.run_first)
    return finetune_block(model.blocks[0], run, inputs, targets, config, **how)  # type: ignore[arg-type]


def error(model: Model, which: list[int] | None = None, seed: int = 2) -> float:
    """Mean relative squared error of block 0 on 32 random sequences, or on some of them."""
    inputs, targets = model.hidden(32, seed, model.exact[:1])
    chosen = range(32) if which is None else which
    with torch.no_grad():
        out = model.run_first(model.blocks[0], inputs[list(chosen)])
    targets = targets[list(chosen)]
    return float(((out - targets).square().sum(-1) / targets.square().sum(-1)).mean())


def test_it_helps_on_samples_it_has_not_seen(model: Model) -> None:
    before = error(model)
    report = tune(model)
    assert error(model) < 0.8 * before
    assert report.after < 0.8 * report.before
    assert len(report.history) == 3
    assert (report.best_epoch, report.steps, report.skipped) == (3, 21, 0)
    assert report.stopped == ""


def test_what_is_measured_is_what_is_written(model: Model) -> None:
    report = tune(model)
    for name, p in model.blocks[0].named_parameters():
        assert torch.equal(p, p.bfloat16().float()), name
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    _, validation = split(32, CONFIG.held_out, CONFIG.seed)
    assert report.after == pytest.approx(error(model, validation, seed=1), rel=1e-5)


def test_it_never_ends_worse_than_it_began(model: Model) -> None:
    before = model.values()
    report = tune(model, replace(CONFIG, rates=WILD, epochs=5))
    assert report.after == report.before
    assert report.best_epoch == 0
    assert same(before, model.values())
    assert report.stopped == "no gain in 2 epochs"
    assert len(report.history) == 2


def test_in_float32_it_never_ends_worse_either(model: Model) -> None:
    for layer in aqlm_layers(model.blocks[0]).values():
        layer.dtype = torch.float32
    before = error(model)
    report = tune(model, replace(CONFIG, dtype=torch.float32, rates=WILD))
    assert report.after == report.before
    assert error(model) == before


def test_the_same_seed_gives_the_same_bits(model: Model) -> None:
    twin, other = tuning.build(), tuning.build()
    assert tune(model) == tune(twin)
    assert same(model.values(), twin.values())
    tune(other, replace(CONFIG, seed=1))
    assert not same(model.values(), other.values())


def test_micro_batches_add_up_to_the_batch(model: Model) -> None:
    twin = tuning.build()
    whole = tune(model)
    pieces = tune(twin, replace(CONFIG, micro_tokens=SEQLEN))
    assert pieces.steps == whole.steps
    assert pieces.history == pytest.approx(whole.history, rel=1e-2)


def test_only_what_may_change_changes(model: Model) -> None:
    before = model.values()
    tune(model, tuned=["input_layernorm.weight"])
    after = model.values()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "0.input_layernorm.weight" in changed
    assert "0.post_attention_layernorm.weight" not in changed
    assert {name for name in before if name.endswith("codebooks") and name[0] == "0"} <= changed
    assert not {name for name in changed if name.endswith("codes") or name[0] != "0"}


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(model: Model) -> None:
    calls = 0

    def run(block: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal calls
        out = model.run_first(block, hidden)
        if out.requires_grad:
            calls += 1
            if calls == 4:
                out.register_hook(lambda grad: grad * math.inf)
        return out

    report = tune(model, run=run)
    assert (report.skipped, report.steps, report.stopped) == (1, 21, "")
    assert report.after < report.before


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far(model: Model) -> None:
    calls = 0

    def run(block: nn.Module, hidden: Tensor) -> Tensor:
        nonlocal calls
        out = model.run_first(block, hidden)
        calls += out.requires_grad
        return out * math.nan if calls == 9 else out

    report = tune(model, run=run)
    assert report.stopped == "the loss is not finite"
    assert (report.steps, report.best_epoch) == (8, 1)
    assert report.after < report.before
    assert all(bool(p.isfinite().all()) for p in model.blocks[0].parameters())


def test_parameters_leave_in_the_dtype_that_they_came_in(model: Model) -> None:
    """On a GPU the block is in the model's dtype, and its norms learn in float32."""
    norm = model.blocks[0].get_parameter("input_layernorm.weight")
    norm.data = norm.data.bfloat16()
    learner = training.Learner(model.blocks[0], None, torch.bfloat16, CONFIG.rates, CONFIG.betas)
    assert norm.dtype == torch.float32
    learner.finish(learner.rounded())
    assert norm.dtype == torch.bfloat16
    assert not norm.requires_grad


def test_targets_that_are_not_finite_leave_the_block_as_it_was(model: Model) -> None:
    before = model.values()
    inputs, targets = model.hidden(8, 1, model.exact[:1])
    report = finetune_block(model.blocks[0], model.run_first, inputs, targets * math.nan, CONFIG)
    assert (report.stopped, report.steps) == ("the loss is not finite", 0)
    assert same(before, model.values())


def test_one_sample_is_too_few(model: Model) -> None:
    inputs, targets = model.hidden(1, 1, model.exact[:1])
    report = finetune_block(model.blocks[0], model.run_first, inputs, targets, CONFIG)
    assert report.stopped == "fewer than two samples"


def test_samples_are_read_from_files(model: Model, tmp_path: Path) -> None:
    twin = tuning.build()
    rows = []
    for name, hidden in zip("ab", model.hidden(32, 1, model.exact[:1]), strict=True):
        shape = (32, SEQLEN, 64)
        with writing(tmp_path / name, shape, "F32") as writer:
            writer.append(hidden)
        rows.append(Activations(tmp_path / name, shape, "F32"))
    on_disk = finetune_block(twin.blocks[0], twin.run_first, *rows, CONFIG)
    assert on_disk == tune(model)
    assert same(model.values(), twin.values())


def test_progress_counts_every_step(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    tune(model, on_step=lambda step, total, loss: seen.append((step, total)))
    assert seen == [(i, 21) for i in range(1, 22)]


def test_little_text_is_cut_into_more_steps() -> None:
    assert batch_sizes(224, 2048, 8192, 8192, 32) == (4, 4)
    assert batch_sizes(224, 2048, 8192, 4096, 32) == (4, 2)
    assert batch_sizes(224, 512, 8192, 8192, 32) == (7, 7)
    assert batch_sizes(10, 512, 8192, 8192, 32) == (1, 1)
    assert batch_sizes(224, 131072, 8192, 8192, 32) == (1, 1)


def test_the_split_is_whole_disjoint_and_seeded() -> None:
    for count in (2, 3, 8, 100):
        fit, held = split(count, 1 / 8, 5)
        assert sorted(fit + held) == list(range(count))
        assert len(held) == max(1, round(count / 8))
        assert split(count, 1 / 8, 5) == (fit, held)
    assert split(100, 1 / 8, 6) != split(100, 1 / 8, 5)
    assert shuffled(range(50), 1, 2) != shuffled(range(50), 2, 1)


def test_rates_rise_then_fall() -> None:
    factors = [warm_cosine(step, 100, 0.05) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0.05 <= factors[-1] < 0.06


def test_a_step_is_a_fraction_of_the_parameter() -> None:
    model = tuning.build()
    block = model.blocks[0]
    norm = block.get_parameter("input_layernorm.weight")
    norm.data.zero_()  # a norm that stores w - 1 begins like this
    learner = training.Learner(block, None, torch.bfloat16, Rates(0.01, 0.02, 0.03), (0.9, 0.95))
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    for p in learner.parameters.values():
        p.grad = torch.full_like(p, 1e-12)
    assert learner.step(0.5)
    for name, p in learner.parameters.items():
        moved = float((before[name] - p.detach()).abs().mean())
        rms = float(before[name].square().mean().sqrt())
        leaf = name.rpartition(".")[2]
        rate = {"codebooks": 0.01, "scales": 0.02}.get(leaf, 0.03)
        size = rms if leaf in ("codebooks", "scales") else max(rms, 0.1)
        assert moved == pytest.approx(0.5 * rate * size, rel=1e-3), name
