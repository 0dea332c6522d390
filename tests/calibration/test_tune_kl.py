"""Tuning against the model's own logits: it helps, and kill -9 does not change a bit."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qconvert.calibration.finetune import FinetuneConfig, finetune_block
from qconvert.calibration.training import Learner, Rates, split
from qconvert.calibration.tune_kl import STATE_NAME, KLReport, _head, _State, tune_kl
from tests.calibration import tuning
from tests.calibration.tuning import KL, SEQLEN, Model, same

STEPS = 12
"""21 samples to train on, four to a step, two epochs."""

_one_thread = pytest.fixture(autouse=True, scope="module")(tuning.one_thread)


def divergence(model: Model, which: list[int] | None = None, seed: int = 2) -> float:
    """Nats a token between the whole models on 24 random sequences, or on some of them."""
    inputs, targets = model.hidden(24, seed, model.exact)
    chosen = list(range(24)) if which is None else which
    with torch.no_grad():
        out = inputs[chosen]
        for i, block in enumerate(model.blocks):
            out = model.run(i, block, out)
        student = model.logits(out).log_softmax(-1)
        teacher = model.logits(targets[chosen]).log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A run that nothing interrupted."""
    model = tuning.build()
    return model, tuning.tune(model, tmp_path_factory.mktemp("straight"))


def test_it_helps_on_samples_it_has_not_seen(straight: tuple[Model, Any]) -> None:
    tuned, report = straight
    assert divergence(tuned) < 0.9 * divergence(tuning.build())
    assert report.after < 0.9 * report.before
    assert (report.steps, report.skipped, report.stopped, report.best_epoch) == (STEPS, 0, "", 2)


def test_what_is_measured_is_what_is_written(straight: tuple[Model, Any]) -> None:
    tuned, report = straight
    for block in tuned.blocks:
        for name, p in block.named_parameters():
            assert torch.equal(p, p.bfloat16().float()), name
    _, validation = split(24, KL.held_out, KL.seed)
    assert report.after == pytest.approx(divergence(tuned, validation, seed=1), rel=1e-4)


def test_killed_it_goes_on_to_the_same_bits(straight: tuple[Model, Any], tmp_path: Path) -> None:
    step = 5
    command = [sys.executable, "-m", "tests.calibration.tuning", str(tmp_path), str(step)]
    killed = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    model = tuning.build()
    report = tuning.tune(model, tmp_path)
    assert report.resumed_at == step - step % KL.save_every
    assert same(model.values(), straight[0].values())
    assert replace(report, resumed_at=0) == straight[1]


class Stop(Exception):
    """What an interrupt is to the stage: an exception out of `on_step`."""


@pytest.mark.parametrize("step", [1, 7, STEPS])
def test_interrupted_it_goes_on_to_the_same_bits(
    step: int, straight: tuple[Model, Any], tmp_path: Path
) -> None:
    def stop(done: int, *_: object) -> None:
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        tuning.tune(tuning.build(), tmp_path, stop)
    (tmp_path / f"{STATE_NAME}.part").write_bytes(b"torn")
    model = tuning.build()
    assert replace(tuning.tune(model, tmp_path), resumed_at=0) == straight[1]
    assert same(model.values(), straight[0].values())


def test_a_state_keeps_the_steps_of_each_parameter(tmp_path: Path) -> None:
    """A layer that no token reached has taken none, and begins when one does."""

    def learner() -> Learner:
        return Learner(nn.LayerNorm(4), None, torch.bfloat16, tuning.RATES, (0.9, 0.95))

    def step(each: Learner, *names: str) -> None:
        for name in names:
            each.parameters[name].grad = torch.arange(1.0, 5.0)
        assert each.step(1.0)

    straight, before, after = learner(), learner(), learner()
    for each in (straight, before):
        step(each, "weight")
        step(each, "weight")
    state = _State(tmp_path / STATE_NAME, "key", before)
    state.best = before.rounded()
    state.save(KLReport(1.0, 1.0, steps=2))
    assert _State(tmp_path / STATE_NAME, "another key", after).load() is None
    assert _State(tmp_path / STATE_NAME, "key", after).load() == KLReport(
        1.0, 1.0, steps=2, resumed_at=2
    )
    for each in (straight, after):
        step(each, "weight", "bias")
    assert same(straight.parameters, after.parameters)


def test_a_state_of_another_configuration_is_not_continued(tmp_path: Path) -> None:
    first = tuning.tune(tuning.build(), tmp_path)
    model = tuning.build()
    inputs, targets = model.hidden(24, 1, model.exact)
    other = tune_kl(
        model.blocks, model.run, model.logits, inputs, targets, tmp_path, replace(KL, seed=1)
    )
    assert other.resumed_at == 0
    assert other.history != first.history


def test_it_never_ends_worse_than_it_began(tmp_path: Path) -> None:
    model = tuning.build()
    before = model.values()
    inputs, targets = model.hidden(24, 1, model.exact)
    wild = replace(KL, rates=Rates(3.0, 3.0, 3.0))
    report = tune_kl(model.blocks, model.run, model.logits, inputs, targets, tmp_path, wild)
    assert report.after == report.before
    assert same(before, model.values())


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far(tmp_path: Path) -> None:
    model = tuning.build()
    inputs, targets = model.hidden(24, 1, model.exact)
    steps = 0

    def logits(hidden: Tensor) -> Tensor:
        return model.logits(hidden) * (math.nan if steps == 8 else 1.0)

    def count(done: int, *_: object) -> None:
        nonlocal steps
        steps = done

    report = tune_kl(model.blocks, model.run, logits, inputs, targets, tmp_path, KL, count)
    assert (report.stopped, report.steps) == ("the loss is not finite", 8)
    assert report.best_epoch == 1
    assert report.after < report.before


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    model = tuning.build()
    inputs, targets = model.hidden(24, 1, model.exact)
    steps = 0

    def logits(hidden: Tensor) -> Tensor:
        out = model.logits(hidden)
        if out.requires_grad and steps == 4:
            out.register_hook(lambda grad: grad * math.inf)
        return out

    def count(done: int, *_: object) -> None:
        nonlocal steps
        steps = done

    report = tune_kl(model.blocks, model.run, logits, inputs, targets, tmp_path, KL, count)
    assert (report.skipped, report.steps, report.stopped) == (1, STEPS, "")
    assert report.after < report.before
    with safe_open(tmp_path / STATE_NAME, "pt") as file:
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118


def test_the_head_in_pieces_has_the_gradient_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 50).requires_grad_(False)
    inputs, target = torch.randn(2, 3, 300, 8, generator=g)
    left, right = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    teacher, student = (head(x).log_softmax(-1) for x in (target, left))
    whole = (teacher.exp() * (teacher - student)).sum(-1)
    whole.mean().backward()
    summed = _head(head, right * 1.0, target, 1 / 300)
    assert summed == pytest.approx(whole.sum().item(), rel=1e-5)
    torch.testing.assert_close(left.grad, right.grad)


def test_it_goes_on_from_where_fine_tuning_ended(tmp_path: Path) -> None:
    model = tuning.build()
    inputs, targets = model.hidden(24, 1, model.exact[:1])
    config = FinetuneConfig(epochs=1, dtype=torch.bfloat16, batch_tokens=4 * SEQLEN)
    finetune_block(model.blocks[0], model.run_first, inputs, targets, config)
    before = divergence(model)
    report = tuning.tune(model, tmp_path)
    assert report.after < report.before
    assert divergence(model) < before
