"""AQLM end to end: what is planned, told, written and noted, and that it can be done again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import errors
from qconvert.calibration import hessian, plot, report, solve
from qconvert.calibration.estimate import estimate
from qconvert.calibration.report import BlockReport, Event, Figures, LayerReport, Started, Step
from qconvert.conversion import Request, Result, convert, plan
from qconvert.manifest import RUN_LOG_NAME
from qconvert.staging import MANIFEST_NAME, Staging
from qconvert.types import Action
from tests.aqlm_runs import digest, request, source

LAYERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Event]]:
    """One conversion, and all that it told."""
    events: list[Event] = []
    asked = request(model, tmp_path_factory.mktemp("done") / "out", max_shard_bytes=40_000)
    return convert(asked, on_event=events.append), events


def manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST_NAME).read_text())


def test_the_plan_predicts_every_file_to_the_byte(
    model: Path, done: tuple[Result, list[Event]]
) -> None:
    result, _ = done
    planned = plan(request(model, result.folder, max_shard_bytes=40_000))
    sizes = {shard.name: shard.size for shard in planned.shards}
    sizes |= {file: len(data) for file, data in planned.generated.items()} | dict(planned.copied)
    unpredicted = {MANIFEST_NAME, RUN_LOG_NAME, "README.md", plot.NAME, plot.PNG_NAME}
    found = {p.name: p.stat().st_size for p in result.folder.iterdir()}
    assert {k: v for k, v in found.items() if k not in unpredicted} == sizes
    assert len(planned.shards) > 1
    assert sum(found.values()) <= planned.disk_bytes
    assert set(manifest(result.folder)["files"]) == set(found) - {MANIFEST_NAME, RUN_LOG_NAME}


def test_layers_are_codes_and_norms_have_learned(
    model: Path, done: tuple[Result, list[Event]]
) -> None:
    result, _ = done
    before = load_file(model / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for shard in result.plan.shards:
        after |= load_file(result.folder / shard.name)
    actions = dict.fromkeys(Action, 0)
    moved = 0
    for entry in result.plan.entries:
        actions[entry.action] += 1
        if entry.action is Action.COPY:
            assert torch.equal(after[entry.tensor.name], before[entry.tensor.name])
        if entry.action is Action.TUNE:
            moved += not torch.equal(after[entry.tensor.name], before[entry.tensor.name])
        for spec in entry.outputs:
            assert tuple(after[spec.name].shape) == spec.shape
    assert actions[Action.QUANTIZE] == 2 * len(LAYERS)
    assert actions[Action.TUNE] == 4
    assert moved


def test_what_it_tells_while_it_runs(done: tuple[Result, list[Event]]) -> None:
    result, events = done
    assert isinstance(events[0], Started)
    assert (events[0].count, events[0].done, events[0].tokens) == (2, 0, 16 * 32)
    assert events[0].seconds > 0
    steps = [event for event in events if isinstance(event, Step)]
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert {s.total for s in steps} == {2 * (len(LAYERS) + 3)}
    assert steps[-1].done == steps[-1].total - 1
    assert any(re.search(r"block 2 of 2: fine-tuning, step 1 of \d+, loss", s.what) for s in steps)
    layers = [event for event in events if isinstance(event, LayerReport)]
    assert [x.figures.name for x in layers] == [
        f"model.layers.{block}.{path}" for block in range(2) for path in LAYERS
    ]
    blocks = [event for event in events if isinstance(event, BlockReport)]
    assert [b.index for b in blocks] == [0, 1]
    assert blocks[0].eta_seconds > 0
    assert blocks[1].eta_seconds == 0
    assert result.figures is not None
    assert result.figures.blocks == tuple(b.figures for b in blocks)
    for block in blocks:
        assert block.peak_bytes > 1_000_000
        assert all(0 < layer.error < 0.5 for layer in block.figures.layers)
        tuned = block.figures.tuning
        assert tuned is not None
        assert tuned.after < tuned.before


def test_figures_are_in_the_manifest_and_the_card_and_times_are_not(
    done: tuple[Result, list[Event]],
) -> None:
    result, _ = done
    assert result.figures is not None
    found = manifest(result.folder)["calibration"]
    assert report.figures_from(found["figures"]) == result.figures
    assert (found["nsamples"], found["seqlen"], found["threads"]) == (16, 32, 1)
    assert len(found["text"]["sha256"]) == 64
    assert "torch" in found["versions"]
    assert "seconds" not in json.dumps(found)
    card = (result.folder / "README.md").read_text()
    for layer in result.figures.worst(3):
        assert f"| `{layer.name}` | {layer.error:.3g} |" in card
    log = json.loads((result.folder / RUN_LOG_NAME).read_text())
    assert set(log["calibration_seconds"]) == {"block 0", "block 1"}


def test_the_plot_has_a_point_for_every_layer(done: tuple[Result, list[Event]]) -> None:
    result, _ = done
    root = ElementTree.fromstring((result.folder / plot.NAME).read_bytes())
    marks = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(marks) == 2 * len(LAYERS) + len(LAYERS)  # and one of each in the legend
    texts = [t.text for t in root.findall("{http://www.w3.org/2000/svg}text")]
    assert {*LAYERS, "llama, AQLM 1x4g8"} <= set(texts)


def test_the_plot_escapes_foreign_names_and_bears_extremes() -> None:
    layers = tuple(
        report.LayerFigures(f"model.layers.0.experts.{i}.<w&\x1b>", error, 10)
        for i, error in enumerate((0.0, 1e-9, 3.0))
    )
    figures = Figures("1x16g8", (report.BlockFigures(0, layers),))
    root = ElementTree.fromstring(plot.svg(figures, "<script>\x00&amp;"))
    texts = [t.text for t in root.findall("{http://www.w3.org/2000/svg}text")]
    assert {r"experts.*.<w&\x1b>", r"<script>\x00&amp;"} <= set(texts)
    for mark in root.findall("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(mark.attrib["cy"]) <= float(root.attrib["height"])
    ElementTree.fromstring(plot.svg(Figures("2x8g8", ()), "nothing"))


def test_a_png_of_the_plot_where_matplotlib_is_installed(
    done: tuple[Result, list[Event]],
) -> None:
    result, _ = done
    pytest.importorskip("matplotlib")
    assert (result.folder / plot.PNG_NAME).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_two_workers_make_the_bytes_of_one(
    model: Path, done: tuple[Result, list[Event]], tmp_path: Path
) -> None:
    threads = set()

    def hear(event: Event) -> None:
        if isinstance(event, LayerReport):
            import threading

            threads.add(threading.current_thread())

    asked = request(model, tmp_path / "out", max_shard_bytes=40_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qconvert.devices.find", lambda name: ("cpu", "cpu"))
        convert(asked, on_event=hear)
    assert len(threads) == 4, "two workers for each of two blocks"
    assert digest(tmp_path / "out") == digest(done[0].folder)


@pytest.mark.parametrize("change", ["seed", "epochs", "nsamples", "threads"])
def test_another_setting_is_another_conversion(
    change: str, model: Path, done: tuple[Result, list[Event]], tmp_path: Path
) -> None:
    """The fingerprint of an interrupted run refuses to be continued with other settings."""
    other: dict[str, dict[str, Any]] = {
        "seed": {"calibration": {"seed": 1}},
        "epochs": {"calibration": {"epochs": 2}},
        "nsamples": {"calibration": {"nsamples": 11}},
        "threads": {"threads": 2},
    }
    _interrupt(request(model, tmp_path / "out"), lambda event: isinstance(event, LayerReport))
    with pytest.raises(errors.StaleStaging) as caught:
        convert(request(model, tmp_path / "out", **other[change]))
    assert "--restart" in caught.value.hint


def test_without_fine_tuning_norms_are_copies(model: Path, tmp_path: Path) -> None:
    result = convert(request(model, tmp_path / "out", calibration={"epochs": 0}))
    assert not any(e.action is Action.TUNE for e in result.plan.entries)
    assert result.figures is not None
    assert all(block.tuning is None for block in result.figures.blocks)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[n], t) for n, t in before.items() if "norm" in n)


def test_bfloat16_and_biases(tmp_path: Path) -> None:
    qwen = source(tmp_path, "qwen2", "bfloat16")
    result = convert(request(qwen, tmp_path / "out", calibration={"epochs": 1}))
    written = load_file(tmp_path / "out" / "model.safetensors")
    tuned = [e.tensor.name for e in result.plan.entries if e.action is Action.TUNE]
    assert sum(name.endswith("q_proj.bias") for name in tuned) == 2
    assert {t.dtype for t in written.values()} == {torch.bfloat16, torch.int8}


def test_end_to_end_tuning_comes_last_and_overrides(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = convert(
        request(model, tmp_path / "out", calibration={"tune": "kl"}), on_event=events.append
    )
    assert result.figures is not None
    last = result.figures.end_to_end
    assert last is not None
    assert last.after <= last.before
    assert any(isinstance(e, Step) and e.what.startswith("end to end: tuning") for e in events)
    assert "then end to end" in (tmp_path / "out" / "README.md").read_text()


# ── what an earlier run left ─────────────────────────────────────────────────────────────────


class _Cut(BaseException):
    pass


def _interrupt(asked: Request, when: Callable[[Event], bool]) -> Path:
    """Converts until `when` says so; returns the folder of the unfinished work."""

    def hear(event: Event) -> None:
        if when(event):
            raise _Cut

    with pytest.raises(_Cut):
        convert(asked, on_event=hear)
    assert asked.output is not None
    assert not asked.output.exists()
    return asked.output.parent / f".{asked.output.name}.qconvert-staging" / "work"


def _second_block(event: Event) -> bool:
    return isinstance(event, LayerReport) and event.block == 1


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda work: None,
    "a finished block": lambda work: _flip(work / "block-00000.safetensors"),
    "a finished layer": lambda work: _flip(work / "block-00001" / f"{LAYERS[0]}.safetensors"),
    "no states": lambda work: (work / "hidden-00001.bin").unlink(),
    "short states": lambda work: (work / "hidden-00001.bin").write_bytes(b"\0" * 100),
    "half a file": lambda work: (work / "hidden-00001.bin").rename(work / "hidden-00001.bin.part"),
    "no journal": lambda work: (work.parent / "journal.jsonl").write_bytes(b""),
}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("short states", "half a file") else []
        )
        for name in DAMAGE
    ],
)
def test_what_is_damaged_is_done_again_and_the_rest_is_kept(
    damage: str, model: Path, done: tuple[Result, list[Event]], tmp_path: Path
) -> None:
    asked = request(model, tmp_path / "out", max_shard_bytes=40_000)
    work = _interrupt(asked, _second_block)
    assert (work / "hidden-00001.bin").is_file()
    assert not (work / "hidden-00000.bin").exists()
    DAMAGE[damage](work)
    events: list[Event] = []
    result = convert(asked, on_event=events.append)
    solved = [e.figures.name for e in events if isinstance(e, LayerReport)]
    again = {
        "a finished block": [f"model.layers.0.{path}" for path in LAYERS],
        "a finished layer": [f"model.layers.1.{LAYERS[0]}"],
        "no journal": [
            f"model.layers.{b}.{path}" for b in range(2) for path in LAYERS[: 3 - 2 * b]
        ],
    }.get(damage, [])
    assert solved == again + [f"model.layers.1.{path}" for path in LAYERS[1:]]
    assert digest(tmp_path / "out") == digest(done[0].folder)
    assert result.figures == done[0].figures
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ── what cannot be calibrated ────────────────────────────────────────────────────────────────


def _planted(model: Path, folder: Path, *names: str) -> Path:
    copy = folder / "planted"
    shutil.copytree(model, copy)
    shutil.copy(model.parent / "tokens.npy", folder)
    tensors = load_file(copy / "model.safetensors")
    for name in names:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_nan_in_weights_is_found_before_anything_is_solved(model: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    broken = _planted(model, tmp_path, *(f"{name}.weight" for name in names))
    events: list[Event] = []
    asked = request(broken, tmp_path / "out")
    with pytest.raises(errors.NonFinite) as caught:
        convert(asked, on_event=events.append)
    assert events == []
    assert all(name in str(caught.value) for name in names)
    assert not list(tmp_path.glob("*out*"))
    assert "--skip" not in caught.value.hint, "a model that returns NaN cannot be calibrated"


def test_nan_in_an_embedding_is_seen_in_the_hidden_states(model: Path, tmp_path: Path) -> None:
    broken = _planted(model, tmp_path, "model.embed_tokens.weight")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.NonFinite):
        convert(request(broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_no_token_reaches_and_too_few_tokens_are_noted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tiny model has a linear layer that it never calls: one Hessian is taken away."""
    collect = hessian.collect

    def without_q(*given: Any) -> hessian.Collected:
        found = collect(*given)
        left = {k: v for k, v in found.hessians.items() if k != "self_attn.q_proj"}
        return hessian.Collected(left, ("self_attn.q_proj",))

    monkeypatch.setattr(solve, "collect", without_q)
    asked = request(model, tmp_path / "out", calibration={"nsamples": 4, "epochs": 0})
    result = convert(asked)
    assert any("few" in warning for warning in result.plan.warnings)
    assert result.figures is not None
    for layer in result.figures.layers():
        unseen = "q_proj" in layer.name
        assert layer.samples == (0 if unseen else 4 * 32)
        assert any(("no token" if unseen else "few") in note for note in layer.notes)


def test_one_sample_is_too_few_to_tune_on(model: Path, tmp_path: Path) -> None:
    result = convert(request(model, tmp_path / "out", calibration={"nsamples": 1}))
    assert result.figures is not None
    assert all(block.tuning is None for block in result.figures.blocks)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    tuned = [e.tensor.name for e in result.plan.entries if e.action is Action.TUNE]
    assert len(tuned) == 4
    assert all(torch.equal(after[name], before[name]) for name in tuned)


# ── time ─────────────────────────────────────────────────────────────────────────────────────


def test_the_estimate_grows_with_the_work(model: Path, tmp_path: Path) -> None:
    plans = {
        epochs: plan(request(model, tmp_path / "out", calibration={"epochs": epochs}))
        for epochs in (0, 4)
    }
    none, four = (estimate(plans[epochs], ("cpu",), 1) for epochs in (0, 4))
    assert none.tuning == none.end_to_end == 0 < none.layers
    assert four.tuning > four.passes / 2 > 0
    assert four.total == four.layers + four.passes + four.tuning
    two = estimate(plans[0], ("cpu", "cpu"), 1)
    assert two.layers < none.layers


def test_restart_begins_anew(model: Path, tmp_path: Path) -> None:
    work = _interrupt(request(model, tmp_path / "out"), _second_block)
    assert list(work.iterdir())
    with Staging(tmp_path / "out", "another plan").open(restart=True):
        assert not list(work.iterdir())


# ── any decoder ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("qwen2", 14), ("mistral", 14), ("gemma2", 14), ("phi3", 8), ("opt", 12), ("gpt-neox", 8),
        ("mixtral", 8), ("qwen3-moe", 8), ("llama-untied", 14), ("vlm", 14), ("mamba", 2),
    ],
)  # fmt: skip
def test_every_layer_of_any_decoder(kind: str, layers: int, tmp_path: Path) -> None:
    model = source(tmp_path, kind, "bfloat16")
    result = convert(request(model, tmp_path / "out", skip=None))
    assert result.figures is not None
    assert len(result.figures.layers()) == layers
    for block in result.figures.blocks:
        assert block.tuning is not None
        assert block.tuning.after < block.tuning.before
