"""AQLM with experts quantized one by one: planned, calibrated, cut, resumed, and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qconvert import mixture
from qconvert.calibration.estimate import estimate
from qconvert.calibration.report import Event, LayerReport, figures_from
from qconvert.calibration.solved import damping
from qconvert.cli import app, show_calibration
from qconvert.conversion import Request, Result, convert, plan
from qconvert.methods.aqlm.layer import DAMPING
from qconvert.source import open_folder
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import open_stored
from qconvert.types import Action, Kind, Plan
from qconvert.validation.contract import check_contract
from qconvert.validation.numeric import check_numeric
from tests.aqlm_cases import plan_aqlm, write_aqlm
from tests.aqlm_runs import digest, request, source

SKIP = "(k_proj|v_proj|w3|up_proj)$"
"""Leaves q_proj, o_proj, and two matrices of each expert."""
UNREAD = "model.layers.1.block_sparse_moe.experts.3"


def asked(model: Path, output: Path, **more: Any) -> Request:
    return request(
        model, output, **{"skip": SKIP, "experts": "quantize", "scheme": "1x8g8", **more}
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtral sends a token to one expert, and in its second block never to the last."""
    root = tmp_path_factory.mktemp("source")
    found = {kind: source(root / kind, kind) for kind in ("mixtral", "qwen3-moe", "llama")}
    config = json.loads((found["mixtral"] / "config.json").read_text())
    config["num_experts_per_tok"] = 1
    (found["mixtral"] / "config.json").write_text(json.dumps(config))
    tensors = load_file(found["mixtral"] / "model.safetensors")
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    router[3] = router[:3].float().mean(0)  # a mean is never the largest
    save_file(tensors, found["mixtral"] / "model.safetensors", metadata={"format": "pt"})
    return found


@pytest.fixture(scope="module")
def done(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, list[Event]]:
    events: list[Event] = []
    output = tmp_path_factory.mktemp("done") / "out"
    return convert(asked(models["mixtral"], output), on_event=events.append), events


def of_experts(made: Plan) -> list[Any]:
    roles = made.structure.roles
    return [e for e in made.entries if roles[e.tensor.name].kind is Kind.EXPERT]


# ── the plan ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_quantized_experts_are_layers_and_no_router_is(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    made = plan(asked(models[kind], tmp_path / "out", skip="k_proj$"))
    assert {e.action for e in of_experts(made)} == {Action.QUANTIZE}
    listed = json.loads(made.generated["config.json"])["quantization_config"]
    names = listed["linear_weights_not_to_quantize"]
    router = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
    assert {f"model.layers.{i}.{router}.weight" for i in range(2)} <= set(names)
    assert not any("experts" in name for name in names)
    assert any("transformers 4.57 loads this checkpoint" in it for it in made.warnings)


def test_an_expert_that_stays_among_others_is_listed_for_both_versions(
    models: dict[str, Path], tmp_path: Path
) -> None:
    made = plan(asked(models["mixtral"], tmp_path / "out", skip=r"experts\.1\.w2|layers\.1\..*w1"))
    listed = json.loads(made.generated["config.json"])["quantization_config"]
    names = set(listed["linear_weights_not_to_quantize"])
    kept = {e.tensor.name for e in of_experts(made) if e.layer is None}
    assert len(kept) == 6
    assert kept == {name for name in names if "experts" in name and name.endswith(".weight")}
    assert {name.removesuffix(".weight") for name in kept} <= names


def test_the_list_has_no_limit_where_transformers_5_is_out_of_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.containers.aqlm.MAX_EXPERT_NAMES", 2)
    made = plan(asked(models["mixtral"], tmp_path / "out", skip=r"layers\.1\..*experts"))
    names = json.loads(made.generated["config.json"])["quantization_config"]
    kept = {e.tensor.name for e in of_experts(made) if e.layer is None}
    assert len(kept) == 12
    assert kept <= set(names["linear_weights_not_to_quantize"])
    assert not any("will not load this" in warning for warning in made.warnings)


def routed(model: Path, folder: Path, chosen: int) -> Path:
    """The same checkpoint, which sends a token to `chosen` experts."""
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": chosen}))
    return folder


def test_memory_and_time_count_the_tokens_that_reach_an_expert(
    models: dict[str, Path], tmp_path: Path
) -> None:
    seqlen, chosen = 65_536, (1, 2, 4)
    settings = {"nsamples": 256, "seqlen": seqlen, "quality": "fast", "epochs": 4, "tune": "none"}
    plans = [
        plan_aqlm(
            routed(models["mixtral"], tmp_path / str(k), k), calibration=settings,
            experts="quantize",
        )
        for k in chosen
    ]  # fmt: skip
    one, two, four = (it.peak_bytes for it in plans)
    ends = 3 * (64 + 128)  # what an expert's layers read and write
    assert (two - one, four - two) == (3 * 4 * seqlen * ends, 2 * 3 * 4 * seqlen * ends)
    passes = [estimate(it, ("cpu",), 1).passes for it in (plans[0], plans[2])]
    assert passes[0] < passes[1]


def test_text_too_short_for_experts_is_warned_of_in_time(
    models: dict[str, Path], tmp_path: Path
) -> None:
    made = plan(asked(models["mixtral"], tmp_path / "out"))
    (warning,) = [it for it in made.warnings if "an expert reads" in it]
    assert "reads 128 tokens of calibration on average, few for layers of 128 columns" in warning
    assert "--nsamples 64" in warning
    kept = plan(asked(models["mixtral"], tmp_path / "out", experts="keep"))
    assert not any("an expert reads" in it for it in kept.warnings)


# ── the result ───────────────────────────────────────────────────────────────────────────────


def test_experts_are_codes_close_to_their_weights(
    models: dict[str, Path], done: tuple[Result, list[Event]]
) -> None:
    result, _ = done
    sizes = {shard.name: shard.size for shard in result.plan.shards}
    assert {name: (result.folder / name).stat().st_size for name in sizes} == sizes
    stored = open_stored(result.folder)
    assert check_contract(stored, plan=result.plan).passed
    numeric = check_numeric(stored, open_folder(models["mixtral"]))
    assert numeric.passed, numeric
    quantized = {e.layer.name for e in result.plan.quantized() if e.layer}
    assert sum(".experts." in name for name in quantized) == 2 * 4 * 2
    assert quantized == stored.layers.keys()


def test_each_expert_is_told_with_the_tokens_that_it_read(
    done: tuple[Result, list[Event]],
) -> None:
    result, events = done
    assert result.figures is not None
    layers = result.figures.layers()
    assert [e.figures for e in events if isinstance(e, LayerReport)] == layers
    for block in (0, 1):
        read = [it.samples for it in layers if f".{block}.block_sparse_moe" in it.name]
        assert sum(read) == 2 * 16 * 32
    unread = [it for it in layers if it.name.startswith(UNREAD)]
    assert [it.samples for it in unread] == [0, 0]
    assert all("no token reached it" in note for it in unread for note in it.notes)
    few = [it for it in layers if 0 < it.samples < 256 and ".experts." in it.name]
    assert few
    assert all(it.notes[-1].startswith("fewer than") for it in few)


def test_how_the_text_fell_on_experts_is_told_and_kept(
    done: tuple[Result, list[Event]],
) -> None:
    result, _ = done
    assert result.figures is not None
    found = result.figures.experts
    assert found is not None
    assert (found.count, found.unread, found.least, found.wanted) == (8, 1, 0, 4)
    assert 1 < found.few <= 8
    document = json.loads((result.folder / MANIFEST_NAME).read_text())
    assert figures_from(document["calibration"]["figures"]) == result.figures
    line = f"{found.few} of 8 experts read fewer than 4 tokens for each of their columns"
    (told,) = [it for it in show_calibration.remarks(result.figures) if line in it]
    assert "1 of them none" in told
    card = (result.folder / "README.md").read_text()
    assert f"of 8 experts, {found.few} read fewer than 4 for each of their columns, and 1" in card
    assert "leaves them random without failing" in card
    assert document["options"]["experts"] == "quantize"


def test_transformers_5_is_not_asked_to_read_it(done: tuple[Result, list[Event]]) -> None:
    """The reload level asks the same of every folder, before it loads anything."""
    stored = open_stored(done[0].folder)
    layers = [layer for layer, _ in stored.layers.values()]
    assert "leaves these random" in mixture.unread(stored.structure(), stored.container, layers)
    dense = [layer for layer in layers if ".experts." not in layer.name]
    assert mixture.unread(stored.structure(), stored.container, dense) == ""


def test_a_dense_model_says_nothing_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    lama = request(models["llama"], tmp_path / "out", calibration={"epochs": 0})
    result = convert(lama)
    assert result.figures is not None
    assert result.figures.experts is None
    assert "experts" not in result.figures.as_json()
    assert "expert" not in (tmp_path / "out" / "README.md").read_text()


class _Cut(BaseException):
    pass


def test_cut_among_the_experts_it_ends_with_the_same_bytes(
    models: dict[str, Path], done: tuple[Result, list[Event]], tmp_path: Path
) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, LayerReport) and event.figures.name.endswith(
            "1.block_sparse_moe.experts.1.w1"
        ):
            raise _Cut

    again = asked(models["mixtral"], tmp_path / "out")
    with pytest.raises(_Cut):
        convert(again, on_event=cut)
    events: list[Event] = []
    result = convert(again, on_event=events.append)
    solved = [e.figures.name for e in events if isinstance(e, LayerReport)]
    assert solved[0] == "model.layers.1.block_sparse_moe.experts.1.w2"
    assert digest(tmp_path / "out") == digest(done[0].folder)
    assert result.figures == done[0].figures


def test_end_to_end_with_some_experts_kept(models: dict[str, Path], tmp_path: Path) -> None:
    skip = r"(k_proj|v_proj)$|experts\.2|layers\.1\.mlp\.experts\.0\.up_proj"
    result = convert(
        asked(
            models["qwen3-moe"], tmp_path / "out", skip=skip, scheme="1x4g8",
            calibration={"tune": "kl"},
        )
    )  # fmt: skip
    assert result.figures is not None
    assert result.figures.end_to_end is not None
    assert result.figures.end_to_end.after <= result.figures.end_to_end.before
    for block in result.figures.blocks:
        assert block.tuning is not None
        assert block.tuning.after < block.tuning.before
    before = load_file(models["qwen3-moe"] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if ".experts.2." in name]
    assert len(kept) == 6
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert check_contract(open_stored(tmp_path / "out"), plan=result.plan).passed


def test_the_contract_sees_an_expert_that_transformers_4_is_not_told_of(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    write_aqlm(
        models["mixtral"], folder, {"scheme": "1x8g8"}, experts="quantize", skip=r"layers\.1\..*w2"
    )
    assert check_contract(open_stored(folder)).passed
    config = json.loads((folder / "config.json").read_text())
    kept = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    config["quantization_config"]["linear_weights_not_to_quantize"].remove(kept)
    (folder / "config.json").write_text(json.dumps(config))
    failed = [it for it in check_contract(open_stored(folder)).checks if not it.passed]
    assert any(f"{kept} is missing, as some loaders spell it" in it.detail for it in failed)


# ── how little text is enough ────────────────────────────────────────────────────────────────


def test_the_less_text_the_more_is_damped() -> None:
    assert damping(0, 64) == damping(64 * 100, 64) == DAMPING
    assert damping(64, 64) == 1
    assert damping(16, 64) == 4


# ── the command line ─────────────────────────────────────────────────────────────────────────


def test_the_plan_on_the_screen(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["plan", "aqlm", str(models["mixtral"]), "--experts", "quantize", "--scheme", "1x4g8"]
    words += [
        "--calibration",
        str(models["mixtral"].parent / "tokens.npy"),
        "--device",
        "cpu",
        "--quality",
        "fast",
    ]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert (
        "4 experts × 3 tensors × 2 layers in model.layers.*.mlp.experts: quantized" in done.output
    )
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    (row,) = data["loaders"]
    assert row["versions"] == "4.57 to 4.57.6 with aqlm ≥ 1.1.6"
