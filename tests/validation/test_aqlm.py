"""What only AQLM can have wrong: codebooks, tuned norms, a list in two spellings, turned codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.source import open_checkpoint
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import open_stored
from qconvert.types import Verdict
from qconvert.validation import truncate, validate_folder
from qconvert.validation.comparison import compare
from qconvert.validation.numeric import check_numeric
from tests.aqlm_cases import plan_aqlm, write_aqlm
from tests.models import tiny
from tests.validation import faults
from tests.validation.faults import LAYER, TWIN, failed
from tests.validation.test_reload import reload

Folders = Callable[[str], Path]
NAMES = [name for name in faults.METHODS if name.startswith("aqlm")]
NORM = "model.layers.0.input_layernorm.weight"
LISTED = "linear_weights_not_to_quantize"


def numeric(folder: Path, source: Path, **options: Any) -> dict[str, str]:
    return failed(check_numeric(open_stored(folder), open_checkpoint(str(source)), **options))


def contract(folder: Path) -> dict[str, str]:
    return failed(validate_folder(folder, levels=["contract"]).reports[0])


# ── codebooks and scales ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_the_codebooks_of_another_layer(name: str, broken: Folders, source: Path) -> None:
    def swap(tensors: faults.Tensors) -> None:
        one, other = (f"{layer}.codebooks" for layer in (LAYER, TWIN))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    folder = faults.reseal(faults.rewrite(broken(name), swap))
    assert contract(folder) == {}
    found = numeric(folder, source)
    assert LAYER in found["every group's gain is as expected"]
    assert TWIN in found["every tensor's error is as expected"]
    assert len(NAMES) == 3


@pytest.mark.parametrize("name", ["aqlm4", "aqlm2"])
def test_codebooks_in_the_wrong_order(name: str, broken: Folders, source: Path) -> None:
    def turn(values: np.ndarray) -> None:
        books = values.reshape(-1, 256 * 8)
        books[:] = books[::-1].copy()

    folder = faults.reseal(faults.edit(broken(name), f"{LAYER}.codebooks", turn))
    assert LAYER in "".join(numeric(folder, source).values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_a_scaled_codebook(name: str, factor: float, broken: Folders, source: Path) -> None:
    def scale(values: np.ndarray) -> None:
        values *= factor

    folder = faults.reseal(faults.edit(broken(name), f"{LAYER}.codebooks", scale))
    assert LAYER in numeric(folder, source)["every group's gain is as expected"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_one_row_of_another_size_or_sign(
    name: str, factor: float, broken: Folders, source: Path
) -> None:
    def scale(values: np.ndarray) -> None:
        values[7] *= factor

    folder = faults.reseal(faults.edit(broken(name), f"{LAYER}.scales", scale))
    assert LAYER in numeric(folder, source)["every group's gain is as expected"]


def test_a_gain_is_the_fitted_slope() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(0, 1, (10, 64)).astype(np.float32)
    decoded = weights * np.float32(0.8)
    decoded[3] *= 2
    errors = compare(weights, decoded)
    squares = np.square(weights).sum(axis=1)
    assert errors.gain == pytest.approx(
        0.8 * (squares.sum() + squares[3]) / squares.sum(), rel=1e-5
    )
    low, high = errors.group_gains
    assert high / low == pytest.approx(2, rel=1e-5)
    zeros = np.zeros((3, 8), np.float32)
    assert compare(zeros, zeros).group_gains == (1.0, 1.0)
    assert compare(weights, -weights).group_gains == (-np.inf, np.inf)


# ── what was tuned ───────────────────────────────────────────────────────────────────────────


def test_tuned_norms_may_differ_a_little(results: Folders, source: Path) -> None:
    report = check_numeric(open_stored(results("aqlm2")), open_checkpoint(str(source)))
    assert report.passed
    assert report.data["tuned"]["tensors"] == 4
    assert 0 < report.data["tuned"]["largest_change"] < 0.02


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__setitem__(slice(None), 0),
        lambda v: np.multiply(v, 2, out=v),
        lambda v: v.__setitem__(9, -v[9]),
        lambda v: v.__setitem__(3, np.nan),
        lambda v: v.__setitem__(3, np.inf),
    ],
    ids=["zeroed", "doubled", "one sign", "nan", "inf"],
)
def test_a_tuned_norm_that_went_too_far(
    change: Callable[[np.ndarray], Any], broken: Folders, source: Path
) -> None:
    folder = faults.reseal(faults.edit(broken("aqlm2"), NORM, change))
    found = numeric(folder, source)
    assert NORM in found["tuned tensors are close to the source's"]
    assert len(found) == 1


def test_what_nobody_says_was_tuned_must_be_the_sources(broken: Folders, source: Path) -> None:
    folder = broken("aqlm2")
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text())
    document["plan"]["kept"][NORM] = "not a linear layer"
    path.write_text(json.dumps(document))
    assert f"tensor {NORM}" in numeric(folder, source)["copies are the source's"]
    path.unlink()  # somebody else's folder: norms and biases may be tuned, and nothing else
    assert numeric(folder, source) == {}
    faults.edit(folder, "model.embed_tokens.weight", lambda v: v.__setitem__(0, 1.0))
    assert "embed_tokens" in numeric(folder, source)["copies are the source's"]


def test_a_manifest_cannot_call_everything_tuned(broken: Folders, source: Path) -> None:
    folder = faults.edit(
        broken("aqlm2"), "model.embed_tokens.weight", lambda v: v.__setitem__(0, 1.0)
    )
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text())
    document["plan"]["kept"] = dict.fromkeys(document["plan"]["kept"], "tuned with its block")
    path.write_text(json.dumps(document))
    assert "embed_tokens" in numeric(folder, source)["copies are the source's"]


def test_the_plan_decides_while_there_is_no_manifest(broken: Folders, source: Path) -> None:
    folder = broken("aqlm2")
    (folder / MANIFEST_NAME).unlink()
    assert numeric(folder, source, plan=plan_aqlm(source)) == {}
    untuned = numeric(folder, source, plan=plan_aqlm(source, tune=False))
    assert NORM in untuned["copies are the source's"]


# ── names, lists and shapes ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lost", ["lm_head", "lm_head.weight"])
def test_a_list_in_one_spelling(lost: str, broken: Folders) -> None:
    """Each is a checkpoint that half of the transformers versions load as noise."""
    folder = faults.configure(
        broken("aqlm2"), lambda c: c["quantization_config"][LISTED].remove(lost)
    )
    found = contract(faults.reseal(folder))
    assert f"{lost} is missing" in found["every linear layer is quantized or listed"]


@pytest.mark.parametrize("entry", [LAYER, f"{LAYER}.weight", "model.layers.1"])
def test_a_quantized_layer_in_the_list(entry: str, broken: Folders) -> None:
    folder = faults.configure(
        broken("aqlm2"), lambda c: c["quantization_config"][LISTED].append(entry)
    )
    found = contract(faults.reseal(folder))
    assert f"{LAYER} is listed, and quantized" in str(found)


@pytest.mark.parametrize(
    "change", [{"num_codebooks": 1}, {"nbits_per_codebook": 7}, {"in_group_size": 16}]
)
def test_a_scheme_that_the_tensors_deny(change: dict[str, int], broken: Folders) -> None:
    folder = faults.configure(broken("aqlm2"), lambda c: c["quantization_config"].update(change))
    assert contract(faults.reseal(folder))


def test_codes_as_a_cpu_leaves_them(broken: Folders) -> None:
    """`save_pretrained` after a forward pass: aqlm has turned the codes of every layer."""

    def turn(tensors: faults.Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".codes")]:
            dtype, (rows, groups, books), data = tensors[name]
            codes = np.frombuffer(data, np.int8).reshape(rows, groups, books).swapaxes(0, 1)
            tensors[name] = (dtype, (groups, rows, books), codes.tobytes())

    found = contract(faults.reseal(faults.rewrite(broken("aqlm2"), turn)))
    assert "the tensors are those of the model" in found


# ── reload ───────────────────────────────────────────────────────────────────────────────────


def test_three_levels_make_verified(results: Folders, source: Path) -> None:
    found = validate_folder(results("aqlm2"), against=source, device="cpu")
    assert [failed(report) for report in found.reports] == [{}, {}, {}]
    assert found.verdict is Verdict.VERIFIED
    data = found.reports[2].data
    assert "from_pretrained, aqlm 1." in data["loader"]
    assert data["dtype"] == "float32"  # aqlm's kernel knows no other on a CPU
    assert 64 <= data["tokens_by_loader"] <= 128 < data["tokens"]
    assert data["loader_error"] <= 1e-5
    assert data["kl_divergence"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-untied", "qwen2", "gemma2", "phi3", "opt", "vlm", "bert"])
def test_other_architectures_are_verified(kind: str, tmp_path: Path) -> None:
    source = tiny(kind, tmp_path / "source")
    write_aqlm(source, tmp_path / "out", {"bits": 2})
    found = validate_folder(tmp_path / "out", against=source, device="cpu")
    assert [failed(report) for report in found.reports] == [{}, {}, {}]
    assert found.verdict is Verdict.VERIFIED


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["1x16g8", "1x12g8"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_schemes_and_dtypes_are_verified(scheme: str, dtype: str, tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source", dtype=dtype)
    write_aqlm(source, tmp_path / "out", {"scheme": scheme})
    report = reload(tmp_path / "out", source, device="cpu")
    assert failed(report) == {}
    assert "tokens_by_loader" not in report.data  # any number of tokens at once


@pytest.mark.slow
def test_a_model_too_large_is_reloaded_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.validation.test_reload import three_blocks

    source = three_blocks(tmp_path)
    write_aqlm(source, tmp_path / "out", skip=r"layers\.2")
    monkeypatch.setattr(truncate, "available_memory", lambda: 0)
    report = reload(tmp_path / "out", source, device="cpu")
    assert failed(report) == {}
    assert report.data["truncated"].startswith("first 2 blocks")


@pytest.mark.slow
def test_what_the_list_forgets_is_noise_to_the_loader(broken: Folders, source: Path) -> None:
    """The contract level sees it; so does the loader's answer, if anybody asks."""
    folder = faults.configure(
        broken("aqlm2"), lambda c: c["quantization_config"].update({LISTED: ["lm_head.weight"]})
    )
    report = reload(folder, source, device="cpu")
    assert not report.passed
    assert not report.skipped
