"""The solver of one AQLM layer: its steps against brute force, and what it does with odd layers."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.methods.aqlm.codebooks import fit_codebooks, fit_scales, initial
from qconvert.methods.aqlm.feedback import codes_by_feedback, k_best
from qconvert.methods.aqlm.layer import LayerConfig, LayerResult, quantize_layer
from qconvert.methods.aqlm.search import Numba, PlainTorch, search
from qconvert.methods.aqlm.state import Layer, Solution, decode, prepare
from qconvert.methods.aqlm.windows import refine

SEEDS = st.integers(0, 2**31)


def random_layer(
    seed: int, out_features: int = 24, in_features: int = 32, group: int = 8, tokens: int = 200
) -> tuple[Tensor, Tensor]:
    """A weight, and a Hessian of correlated activations of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    strength = torch.logspace(0, -2, in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) @ (torch.eye(in_features) + mix)
    inputs = inputs * strength
    return weight, inputs.T @ inputs / tokens


def dequantized(result: LayerResult) -> Tensor:
    plain = decode(result.codes, result.codebooks[:, :, 0])
    return plain * result.scales.reshape(-1, 1)


def relative_loss(weight: Tensor, hessian: Tensor, other: Tensor) -> float:
    error = (weight - other).double()
    hessian, weight = hessian.double(), weight.double()
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


# ── search ───────────────────────────────────────────────────────────────────────────────────


@given(SEEDS, st.sampled_from([4, 8, 16, 32]), st.sampled_from([2, 3, 6, 8, 9]), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_nearest_is_what_brute_force_finds(seed: int, g: int, nbits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(2**nbits, g, generator=generator)
    targets = torch.randn(37, g, generator=generator)
    width = min(width, len(book))
    distances = torch.cdist(targets.double(), book.double()).square()
    expected = distances.sort(1)
    for backend in (Numba(), PlainTorch()):
        codes, costs = backend.nearest(targets, book, width)
        assert torch.equal(codes, expected.indices[:, :width])
        torch.testing.assert_close(costs.double(), expected.values[:, :width], atol=1e-4, rtol=1e-4)


@given(SEEDS, st.sampled_from([1, 2, 4, 6, 8, 9]), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_kernel_and_torch_choose_the_same_pairs(seed: int, nbits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2**nbits, 8, generator=generator)
    second = torch.randn(2**nbits, 8, generator=generator) * 0.6
    targets, width = torch.randn(41, 8, generator=generator), min(width, len(second))
    codes, costs = Numba().pair(targets, first, second, width)
    expected_codes, expected = PlainTorch().pair(targets, first, second, width)
    torch.testing.assert_close(costs, expected, atol=1e-4, rtol=1e-4)
    assert (codes == expected_codes).float().mean() > 0.99
    sums = first[codes[..., 0]] + second[codes[..., 1]]
    torch.testing.assert_close(
        (targets[:, None] - sums).square().sum(-1), costs, atol=1e-4, rtol=1e-4
    )


def test_small_pairs_are_searched_exhaustively() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 16, 8, generator=generator)
    targets = torch.randn(200, 8, generator=generator)
    sums = (first[:, None] + second).reshape(-1, 8)
    best = torch.cdist(targets.double(), sums.double()).square().min(1).values
    _, costs = search(targets, torch.stack([first, second]), 1)
    torch.testing.assert_close(costs[:, 0].double(), best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("books", [3, 4])
def test_many_books_come_close_to_the_best_of_all_sums(books: int) -> None:
    generator = torch.Generator().manual_seed(1)
    size = 8
    codebooks = torch.randn(books, size, 8, generator=generator)
    codebooks *= 0.6 ** torch.arange(books)[:, None, None]
    targets = torch.randn(300, 8, generator=generator)
    codes = torch.tensor(list(itertools.product(range(size), repeat=books)))
    sums = decode(codes[:, None], codebooks)
    best = torch.cdist(targets, sums).square().min(1).values
    found, costs = search(targets, codebooks, 4)
    assert found.shape == (300, 4, books)
    assert (costs.diff(dim=1) >= 0).all()
    torch.testing.assert_close(
        (targets[:, None] - decode(found[:, :, None], codebooks)).square().sum(-1),
        costs, atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert costs[:, 0].mean() < 1.1 * best.mean()


def test_triton_finds_what_torch_finds() -> None:
    """In Triton's interpreter: the same program that a GPU compiles, run on the CPU."""
    pytest.importorskip("triton")
    program = """
import torch
from qconvert.methods.aqlm._triton import Triton
from qconvert.methods.aqlm.search import PlainTorch
generator = torch.Generator().manual_seed(0)
cases = 0
for nbits, g, width in ((3, 8, 1), (8, 8, 2), (9, 4, 1)):
    first, second = torch.randn(2, 2**nbits, g, generator=generator)
    targets = torch.randn(5, g, generator=generator)
    for name, books in (("nearest", (first,)), ("pair", (first, 0.6 * second))):
        ours = getattr(Triton(), name)(targets, *books, width)
        plain = getattr(PlainTorch(), name)(targets, *books, width)
        assert torch.equal(ours[0], plain[0]), (nbits, name)
        torch.testing.assert_close(ours[1], plain[1], atol=1e-4, rtol=1e-4)
        cases += 1
print(cases)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "6", done.stderr[-2000:]


def test_triton_compiles_the_kernels() -> None:
    """Down to machine code, which takes no GPU; the interpreter passes what the compiler does not.

    99 KB of shared memory are what consumer GPUs have.
    """
    pytest.importorskip("triton")
    program = """
import triton
from triton.backends.compiler import GPUTarget
from qconvert.methods.aqlm import _triton
made = 0
for name, constants in (
    ("_chunk_minima", dict(CHUNKS=256, CHUNK=256, G=8, PAD=16, ROWS=64)),
    ("_chunk_minima", dict(CHUNKS=2, CHUNK=256, G=32, PAD=32, ROWS=64)),
    ("_sort_out", dict(CHOSEN=3, PARTS=4, CHUNK=256, G=8, WIDTH=3)),
    ("_pair", dict(SIZE=256, G=8, EXPAND=16, WIDTH=2)),
):
    kernel = getattr(_triton, name)
    types = {"count": "i32", "chosen": "*i32", "codes": "*i64", "near": "*i64"}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "*fp32")
                   for n in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 86, 32))
    assert compiled.metadata.shared <= 99 * 1024, (name, compiled.metadata.shared)
    made += len(compiled.asm["cubin"]) > 0
print(made)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "4", done.stderr[-2000:]


# ── steps ────────────────────────────────────────────────────────────────────────────────────


def small_solution(seed: int, groups: int, nbits: int) -> tuple[Layer, Solution]:
    weight, hessian = random_layer(seed, out_features=6, in_features=8 * groups)
    layer = prepare(weight, hessian, 8, 0.01)
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(1, 2**nbits, 8, generator=generator)
    scales = weight.norm(dim=1) / (8 * groups) ** 0.5
    codes = torch.randint(2**nbits, (6, groups, 1), generator=generator)
    return layer, Solution(codes, books, scales)


def exhaustive(layer: Layer, solution: Solution) -> Tensor:
    """The least loss of each row over all codes."""
    size, groups = solution.codebooks.shape[1], layer.groups
    losses = []
    for codes in itertools.product(range(size), repeat=groups):
        every = torch.tensor(codes).reshape(1, groups, 1).expand(len(layer.weight), -1, -1)
        losses.append(layer.losses(replace(solution, codes=every).weight()))
    return torch.stack(losses).min(0).values


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_a_wide_enough_beam_finds_the_optimum(seed: int, groups: int) -> None:
    layer, solution = small_solution(seed, groups, 2)
    best = exhaustive(layer, solution)
    codes, losses = k_best(
        layer.weight, layer.factor, solution.codebooks, solution.scales, 4**groups
    )
    torch.testing.assert_close(losses, best, rtol=1e-3, atol=1e-9)
    found = layer.losses(replace(solution, codes=codes).weight())
    torch.testing.assert_close(found, losses, rtol=1e-3, atol=1e-9)
    refined = refine(layer, solution, groups, 4**groups, torch.Generator().manual_seed(0))
    found = layer.losses(replace(solution, codes=refined).weight())
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-9)


@given(SEEDS, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_refining_makes_no_row_worse(seed: int, size: int, beam: int) -> None:
    layer, solution = small_solution(seed, 4, 3)
    before = layer.losses(solution.weight())
    codes = refine(layer, solution, size, beam, torch.Generator().manual_seed(seed))
    after = layer.losses(replace(solution, codes=codes).weight())
    assert (after <= before * (1 + 1e-4)).all()


def test_lazy_feedback_is_feedback() -> None:
    """Long rows cross the boundaries of runs; the loss that is returned must still be true."""
    weight, hessian = random_layer(3, out_features=9, in_features=320, tokens=500)
    layer = prepare(weight, hessian, 8, 0.03)
    books = initial(layer, weight.norm(dim=1), 2, 16, steps=3, points=64, seed=0)
    for beam in (1, 3):
        codes, losses = k_best(layer.weight, layer.factor, books, weight.norm(dim=1), beam)
        found = layer.losses(Solution(codes, books, weight.norm(dim=1)).weight())
        torch.testing.assert_close(found, losses, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("books", [1, 2])
def test_codebooks_are_the_least_squares_solution(books: int) -> None:
    weight, hessian = random_layer(5, out_features=40, in_features=24)
    layer = prepare(weight, hessian, 8, 0.03)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (40, 3, books), generator=generator)
    start = torch.randn(books, 4, 8, generator=generator) * 0.02
    scales = torch.rand(40, generator=generator) + 0.5
    solution = Solution(codes, start, scales)
    fitted = replace(solution, codebooks=fit_codebooks(layer, solution, 60))

    root = torch.linalg.cholesky(layer.hessian.double())
    columns = []
    for unit in torch.eye(books * 4 * 8).reshape(-1, books, 4, 8):
        image = replace(solution, codebooks=unit).weight().double() @ root
        columns.append(image.flatten())
    design, goal = torch.stack(columns, 1), (layer.weight.double() @ root).flatten()
    best = torch.linalg.lstsq(design, goal[:, None], driver="gelsd").solution
    least = float((design @ best - goal[:, None]).square().sum())
    assert float(layer.losses(fitted.weight()).sum()) == pytest.approx(least, rel=2e-3)

    scaled = replace(fitted, scales=fit_scales(layer, fitted))
    for factor in (0.9, 1.1):
        off = replace(scaled, scales=scaled.scales * factor)
        assert (layer.losses(off.weight()) >= layer.losses(scaled.weight())).all()


# ── layers ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("books", "nbits", "high"), [(1, 8, 0.25), (2, 8, 0.05), (3, 6, 0.03), (4, 4, 0.06)]
)
def test_error_is_true_and_small(books: int, nbits: int, high: float) -> None:
    weight, hessian = random_layer(7, out_features=128, in_features=128, tokens=1000)
    config = LayerConfig(books, nbits, dtype=torch.bfloat16)
    stages: list[tuple[str, float]] = []
    result = quantize_layer(weight, hessian, config, on_step=lambda *step: stages.append(step))
    assert result.codes.shape == (128, 16, books)
    assert 0 <= result.codes.min() <= result.codes.max() < 2**nbits
    assert result.codebooks.shape == (books, 2**nbits, 1, 8)
    assert result.scales.shape == (128, 1, 1, 1)
    for stored in (result.codebooks, result.scales):
        assert torch.equal(stored, stored.bfloat16().float())
    loss = relative_loss(weight, hessian, dequantized(result))
    assert result.error == pytest.approx(loss, rel=1e-3)
    assert loss < high
    losses = [loss for name, loss in stages if name != "rounding"]
    assert losses[-1] < 0.9 * losses[0]


def test_more_effort_ends_lower() -> None:
    weight, hessian = random_layer(8, out_features=192, in_features=128, tokens=1000)
    errors = [
        quantize_layer(weight, hessian, LayerConfig(2, 6, quality=quality)).error
        for quality in ("fast", "default", "best")
    ]
    assert errors == sorted(errors, reverse=True)


def test_same_arguments_same_bytes() -> None:
    weight, hessian = random_layer(9, out_features=64, in_features=64)
    first, second = (quantize_layer(weight, hessian, LayerConfig(2, 6)) for _ in range(2))
    other = quantize_layer(weight, hessian, LayerConfig(2, 6, seed=1))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebooks, second.codebooks)
    assert torch.equal(first.scales, second.scales)
    assert not torch.equal(first.codes, other.codes)


def test_codes_do_not_depend_on_how_rows_are_shared_out() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(2, 64, 8, generator=generator)
    targets = torch.randn(3000, 8, generator=generator)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(search(targets, books, 2))
    finally:
        torch.set_num_threads(threads)
    for codes, costs in found[1:]:
        assert torch.equal(codes, found[0][0])
        assert torch.equal(costs, found[0][1])


def test_rows_worked_on_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_layer(10, out_features=50, in_features=64)
    layer = prepare(weight, hessian, 8, 0.03)
    books = initial(layer, weight.norm(dim=1), 1, 16, steps=2, points=64, seed=0)
    whole = codes_by_feedback(layer, books, weight.norm(dim=1), 3)
    monkeypatch.setattr("qconvert.methods.aqlm.feedback._ELEMENTS", 7 * 3 * 64)
    assert torch.equal(codes_by_feedback(layer, books, weight.norm(dim=1), 3), whole)


def test_columns_that_are_never_active() -> None:
    weight, hessian = random_layer(11, out_features=64, in_features=64)
    hessian[:, 40:] = 0
    hessian[40:] = 0
    result = quantize_layer(weight, hessian, LayerConfig(2, 6))
    assert any("24 of 64 columns are never active" in note for note in result.notes)
    assert dequantized(result).isfinite().all()
    assert result.error < 0.1
    plain = quantize_layer(weight, torch.zeros(64, 64), LayerConfig(2, 6))
    assert relative_loss(weight, torch.eye(64), dequantized(plain)) < 0.5


def test_an_indefinite_hessian_is_damped_until_it_can_be_factored() -> None:
    weight, hessian = random_layer(12, out_features=32, in_features=32)
    hessian = hessian - 0.2 * hessian.diagonal().mean() * torch.eye(32)
    result = quantize_layer(weight, hessian, LayerConfig(1, 6))
    assert any("damping raised" in note for note in result.notes)
    assert dequantized(result).isfinite().all()


def test_zero_rows_and_more_vectors_than_groups() -> None:
    weight, hessian = random_layer(13, out_features=16, in_features=32)
    weight[3] = 0
    result = quantize_layer(weight, hessian, LayerConfig(1, 8))  # 64 groups, 256 vectors
    assert result.error < 1e-4
    assert dequantized(result)[3].abs().max() < 1e-3 * weight.abs().max()


def test_rows_whose_scale_becomes_zero() -> None:
    weight, hessian = random_layer(13, out_features=48, in_features=64)
    weight[5] = 0
    result = quantize_layer(weight, hessian, LayerConfig(3, 4))
    assert result.scales[5] == 0
    assert int(result.codes.max()) < 16
    assert (dequantized(result)[5] == 0).all()
    assert result.error < 0.1


def test_a_scale_that_the_dtype_does_not_hold() -> None:
    weight, hessian = random_layer(13)
    result = quantize_layer(1e6 * weight, hessian, LayerConfig(2, 4, dtype=torch.float16))
    assert math.isnan(result.error)
    assert any("rounding: not finite" in note for note in result.notes)


def test_what_is_not_finite_is_refused() -> None:
    weight, hessian = random_layer(14)
    broken = weight.clone()
    broken[2, 5] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        quantize_layer(broken, hessian, LayerConfig(1, 4))
    hessian[0, 0] = float("inf")
    with pytest.raises(ValueError, match="Hessian holds NaN"):
        quantize_layer(weight, hessian, LayerConfig(1, 4))


def test_a_step_that_ends_in_nan_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_layer(15)

    def ruined(layer: Layer, solution: Solution, steps: int) -> Tensor:
        return solution.codebooks * float("nan")

    monkeypatch.setattr("qconvert.methods.aqlm.layer.fit_codebooks", ruined)
    result = quantize_layer(weight, hessian, LayerConfig(2, 4))
    assert any("codebooks: not finite" in note for note in result.notes)
    assert dequantized(result).isfinite().all()
    assert result.error < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize(("books", "nbits"), [(2, 8), (1, 12), (3, 8), (2, 10)])
def test_a_gpu_finds_as_good_a_solution_twice_the_same(books: int, nbits: int) -> None:
    weight, hessian = random_layer(16, out_features=512, in_features=512, tokens=4000)
    config = LayerConfig(books, nbits)
    on_cpu = quantize_layer(weight, hessian, config)
    there = [quantize_layer(weight.cuda(), hessian.cuda(), config) for _ in range(2)]
    assert torch.equal(there[0].codes, there[1].codes)
    assert torch.equal(there[0].codebooks, there[1].codebooks)
    assert there[0].error == pytest.approx(on_cpu.error, rel=0.03)


@pytest.mark.gpu
def test_triton_on_a_gpu_finds_what_torch_finds() -> None:
    from qconvert.methods.aqlm._triton import Triton

    generator = torch.Generator().manual_seed(0)
    for nbits, width in ((8, 1), (8, 4), (16, 2)):
        first, second = torch.randn(2, 2**nbits, 8, generator=generator).cuda()
        targets = torch.randn(5000, 8, generator=generator).cuda()
        ours, plain = (b.nearest(targets, first, width) for b in (Triton(), PlainTorch()))
        assert (ours[0] == plain[0]).float().mean() > 0.999
        torch.testing.assert_close(ours[1], plain[1], atol=1e-3, rtol=1e-3)
        if nbits == 8:
            pairs = [b.pair(targets, first, second, width) for b in (Triton(), PlainTorch())]
            assert (pairs[0][0] == pairs[1][0]).float().mean() > 0.999
