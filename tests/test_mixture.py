"""What a plan makes of experts: named, listed in both naming schemes, counted, or refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qconvert import contract, manifest, mixture, recipe
from qconvert.cli import app
from qconvert.conversion import Request, convert, plan
from qconvert.errors import UsageError
from qconvert.stored import open_stored
from qconvert.types import Action, Kind, Plan
from qconvert.validation.contract import check_contract
from tests.models import save, tiny
from tests.tiny_models import TINY

ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen3-moe": "mlp.gate"}
METHODS: dict[str, dict[str, Any]] = {"int8": {}, "nf4": {}, "hqq": {"bits": 4}}
CT = {"bits": 4, "container": "compressed-tensors", "zero": "middle"}
LLAMA4 = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": 2, "interleave_moe_layer_step": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    found = {kind: tiny(kind, root) for kind in ("mixtral", "qwen3-moe", "llama")}
    for kind in ("gpt-oss", "deepseek-v3"):
        save(TINY[kind].architecture, TINY[kind].sizes, root / kind)
        found[kind] = root / kind
    save("Llama4ForCausalLM", LLAMA4, root / "llama4")
    return {**found, "llama4": root / "llama4"}


def planned(source: Path, method: str, experts: str = "keep", **more: Any) -> Plan:
    options = more.pop("options", METHODS.get(method, {}))
    return plan(Request(str(source), method, options, experts=experts, device="cpu", **more))


def kinds(made: Plan, *wanted: Kind) -> list[Any]:
    return [e for e in made.entries if made.structure.roles[e.tensor.name].kind in wanted]


# ── experts that stay ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_experts_and_routers_stay_and_both_versions_are_told(
    kind: str, method: str, sources: dict[str, Path]
) -> None:
    made = planned(sources[kind], method)
    experts, routers = kinds(made, Kind.EXPERT, Kind.EXPERTS), kinds(made, Kind.ROUTER)
    assert len(experts) == sum("experts" in e.tensor.name and "shared" not in e.tensor.name
                               for e in made.entries)  # fmt: skip
    assert experts
    assert routers
    assert {e.action for e in (*experts, *routers)} == {Action.COPY}
    assert all(e.reason for e in made.entries)
    listed = set(made.skip_modules)
    for entry in experts:  # in memory of 5, and on disk, which is in memory of 4
        module = made.structure.roles[entry.tensor.name].module
        assert {module, entry.tensor.name.partition(".experts")[0] + ".experts"} <= listed
    for entry in routers:
        if entry.tensor.name.endswith(".weight"):
            role = made.structure.roles[entry.tensor.name]
            assert {role.module, entry.tensor.name.removesuffix(".weight")} <= listed


def test_what_they_weigh_is_said(sources: dict[str, Path]) -> None:
    made = planned(sources["mixtral"], "nf4")
    (warning,) = made.warnings
    assert warning.startswith("77 % of the weights are experts that stay in full precision")
    assert f"{made.bits_per_weight:.2f} bits per weight" in warning
    assert made.bits_per_weight > 15
    assert planned(sources["llama"], "nf4").warnings == ()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("mixtral", "4 experts × 3 tensors × 2 layers"),
        ("gpt-oss", "4 experts, fused × 4 tensors × 2 layers"),
        ("deepseek-v3", "4 experts × 3 tensors × 1 layer"),
    ],
)
def test_every_expert_is_in_a_group(kind: str, count: str, sources: dict[str, Path]) -> None:
    made = planned(sources[kind], "int8")
    (group,) = mixture.groups(made)
    assert group.count == count
    entries = kinds(made, Kind.EXPERT, Kind.EXPERTS)
    assert group.tensors == len(entries)
    assert group.nbytes == sum(entry.nbytes for entry in entries)
    assert group.numel == sum(entry.tensor.numel for entry in entries)


def test_groups_part_where_fates_do(sources: dict[str, Path]) -> None:
    made = planned(sources["mixtral"], "nf4", "quantize", skip=r"layers\.0\..*w2|experts\.3\.w1")
    quantized, kept = sorted(mixture.groups(made), key=lambda group: group.reason, reverse=True)
    assert (quantized.action, quantized.count) == (Action.QUANTIZE, "18 tensors")
    assert (kept.action, kept.count, kept.reason) == (Action.COPY, "6 tensors", "--skip")


@pytest.mark.parametrize("experts", mixture.CHOICES)
def test_the_screen_and_its_json(experts: str, sources: dict[str, Path]) -> None:
    words = ["plan", "nf4", str(sources["qwen3-moe"]), "--experts", experts]
    screen = " ".join(CliRunner().invoke(app, words).output.split())
    fate = "quantized" if experts == "quantize" else "in full precision"
    assert f"4 experts × 3 tensors × 2 layers in model.layers.*.mlp.experts: {fate}" in screen
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    (group,) = data["experts"]
    assert group["tensors"] == 24
    assert f"{data['bits_per_weight']:.3f} over the whole model" in screen
    names = {name for name in data["tensors"] if ".experts." in name}
    assert len(names) == 24
    action = "quantize" if experts == "quantize" else "copy"
    assert {data["tensors"][name]["action"] for name in names} == {action}
    versions = data["loaders"][0]["versions"]
    assert ("4.57 to 4.57.6" in versions) is (experts == "quantize")


# ── experts that are quantized ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ROUTERS)
def test_experts_are_layers_under_their_names_on_disk(
    kind: str, method: str, sources: dict[str, Path]
) -> None:
    made = planned(sources[kind], method, "quantize")
    layers = [e.layer for e in kinds(made, Kind.EXPERT)]
    assert len(layers) == 24
    assert all(it is not None and it.module == it.name for it in layers)
    assert {e.action for e in kinds(made, Kind.ROUTER)} == {Action.COPY}
    listed = set(made.skip_modules)
    assert not any("experts" in entry for entry in listed)
    assert f"model.layers.1.{ROUTERS[kind]}" in listed
    (warning,) = made.warnings
    assert "transformers 4.57 loads this checkpoint, and transformers 5 does not" in warning
    assert made.bits_per_weight < planned(sources[kind], method).bits_per_weight / 1.3


def test_an_expert_that_stays_among_others_is_listed_by_itself(sources: dict[str, Path]) -> None:
    made = planned(sources["mixtral"], "nf4", "quantize", skip=r"layers\.0\..*experts\.1\.w2")
    of = "model.layers.{}.block_sparse_moe.experts"
    listed = {entry for entry in made.skip_modules if "experts" in entry}
    assert listed == {f"{of.format(0)}.1.w2"}
    made = planned(sources["mixtral"], "nf4", "quantize", skip=r"layers\.0\..*experts")
    listed = {entry for entry in made.skip_modules if "experts" in entry}
    assert listed == {of.format(0), "model.layers.0.mlp.experts"}


def test_the_contract_sees_an_expert_that_is_forgotten(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    request = Request(
        str(sources["mixtral"]), "nf4", output=tmp_path / "it", experts="quantize",
        skip=r"experts\.1\.w2", validate=False, device="cpu", threads=1,
    )  # fmt: skip
    made = convert(request)
    assert made.folder is not None
    assert check_contract(open_stored(made.folder)).passed
    file = made.folder / "config.json"
    config = json.loads(file.read_text())
    key = "llm_int8_skip_modules"
    skipped = config["quantization_config"][key]
    forgotten = "model.layers.1.block_sparse_moe.experts.1.w2"
    config["quantization_config"][key] = [entry for entry in skipped if entry != forgotten]
    file.write_text(json.dumps(config))
    failed = [it for it in check_contract(open_stored(made.folder)).checks if not it.passed]
    assert f"the expert {forgotten} is neither quantized nor listed" in failed[0].detail
    config["quantization_config"][key] = [*skipped, "model.layers.1.block_sparse_moe.experts"]
    file.write_text(json.dumps(config))
    failed = [it for it in check_contract(open_stored(made.folder)).checks if not it.passed]
    assert "experts.0.w1 is listed, and quantized" in failed[0].detail


def test_the_choice_is_in_command_manifest_and_recipe(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(
        Request(
            str(sources["mixtral"]), "nf4", output=tmp_path / "it", experts="quantize",
            validate=False, device="cpu", threads=1,
        )
    )  # fmt: skip
    assert made.folder is not None
    document = manifest.read(made.folder)
    assert document is not None
    words = shlex.split(document["command"])
    assert words[words.index("--experts") + 1] == "quantize"
    read = recipe.read(document)
    again = recipe.request(read, made.plan.checkpoint, str(sources["mixtral"]), None)
    assert again.experts == "quantize"
    assert plan(again).fingerprint == made.plan.fingerprint
    older = {key: value for key, value in read.options.items() if key != "experts"}
    document["options"] = older
    again = recipe.request(recipe.read(document), made.plan.checkpoint, "x", None)
    assert again.experts == "keep"
    card = (made.folder / "README.md").read_text()
    assert "transformers 5 merges the experts of a layer as it loads them and cannot read" in card
    assert '"transformers==4.57.*"' in card
    assert "≥ 4.55" not in card


def test_the_card_says_in_bold_what_kept_experts_cost(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    request = Request(
        str(sources["gpt-oss"]), "hqq", {"bits": 4}, output=tmp_path / "it", validate=False,
        device="cpu", threads=1,
    )  # fmt: skip
    made = convert(request)
    assert made.folder is not None
    card = (made.folder / "README.md").read_text()
    assert f"**{made.plan.bits_per_weight:.2f} effective bits per weight** over the whole" in card
    assert "`4 experts, fused × 4 tensors × 2 layers` of `model.layers.*.mlp.experts` are" in card


# ── what cannot be done ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "method", "options", "experts", "message", "hint"),
    [
        ("llama", "nf4", {}, "quantize", "it has no experts", "leave --experts out"),
        ("gpt-oss", "nf4", {}, "quantize", "no loader reads fused experts", "leave --experts out"),
        ("mixtral", "eetq", {}, "quantize", "no loader of EETQ", "--experts keep"),
        ("gpt-oss", "aqlm", {}, "quantize", "no loader reads fused experts", "leave --experts out"),
        ("mixtral", "nf4", {}, "all", "--experts all", "--experts keep"),
        ("mixtral", "hqq", CT, "keep", "cannot stay in full precision", "--experts quantize"),
        ("mixtral", "hqq", {**CT, "zero": "integer"}, "quantize", "zero points", "--zero middle"),
        ("llama4", "nf4", {}, "keep", "leave them random", "qconvert hqq"),
        ("llama4", "hqq", CT, "keep", "leave them random", "qconvert hqq"),
    ],
    ids=str,
)
def test_refused_with_a_reason(
    kind: str, method: str, options: dict[str, Any], experts: str, message: str, hint: str,
    sources: dict[str, Path],
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=message) as caught:
        planned(sources[kind], method, experts, options=options)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"skip": r"experts\.0\.w1"}, "would stay in full precision"),
        ({"overrides": [r"experts=bits:8"]}, "options of its own"),
    ],
)
def test_compressed_tensors_takes_all_experts_alike(
    more: dict[str, Any], message: str, sources: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        planned(sources["mixtral"], "hqq", "quantize", options=CT, **more)
    other = planned(
        sources["mixtral"], "hqq", "quantize", options=CT, overrides=["self_attn=bits:8"]
    )
    assert {e.method.bits for e in kinds(other, Kind.EXPERT)} == {4}


def test_llama_4_is_taken_where_its_loader_leaves_it_as_it_is(sources: dict[str, Path]) -> None:
    made = planned(sources["llama4"], "hqq")
    assert {e.action for e in kinds(made, Kind.EXPERTS)} == {Action.COPY}


def test_a_format_that_reads_experts_says_how_to_load_them() -> None:
    for name in contract.names():
        format_ = contract.load(name)
        assert ("loaders" in format_.experts) is (format_.root / "EXPERTS.md").is_file()
        assert {"loaders", "refused", "kept"} & format_.experts.keys() or name == "plain"
