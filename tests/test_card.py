"""The card of a result: what it says of which manifest, and that the Hub's own client reads it."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import qconvert
from qconvert import card, manifest, strictyaml
from qconvert.card.facts import Facts, as_repo_id
from qconvert.source import open_checkpoint
from tests.card_cases import CARD, COMMIT, SHA, full


def body_of(document: Any) -> str:
    return strictyaml.split(card.render(document).decode())[1]


def front_of(document: Any) -> Any:
    front, _ = strictyaml.split(card.render(document).decode())
    assert front is not None
    return strictyaml.loads(front, file="card")


def reload(document: Any) -> Any:
    return document["validation"]["reports"][2]


# ── front matter ─────────────────────────────────────────────────────────────────────────────


def test_the_hubs_client_reads_the_card_and_its_results() -> None:
    read = ModelCard(card.render(full()).decode())
    data = read.data
    assert (data.base_model, data.base_model_relation) == ("org/Tiny-7b-hf", "quantized")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.license_name) == ("other", "tiny-licence")
    assert data.license_link == "https://example.com/terms?v=1"
    assert data.language == ["en", "no"]
    assert data.tags == ["qconvert", "aqlm", "2-bit"]
    assert data.quantized_by == "qconvert"
    assert list(data.extra_gated_fields.items()) == [*map(tuple, CARD["extra_gated_fields"])]
    assert data.extra_gated_prompt == CARD["extra_gated_prompt"]
    assert data.model_name == "Tiny-7b-hf-AQLM-2bit"
    found = {r.metric_type: r for r in data.eval_results}
    assert found["perplexity"].metric_value == 7.125
    assert found["kl_divergence"].metric_value == 0.25
    assert found["perplexity"].task_type == "text-generation"
    assert found["perplexity"].dataset_name == "held-out text heldout.txt"
    assert found["perplexity"].dataset_args == {"tokens": 2048}
    again = ModelCard(str(read))
    assert again.data.to_dict() == data.to_dict()


def test_without_a_repository_there_is_no_base_model_but_the_relation() -> None:
    document = full()
    document["source"] |= {"repo_id": None, "revision": None, "name": "my-model", "card": {}}
    front = front_of(document)
    assert "base_model" not in front
    assert front["base_model_relation"] == "quantized"
    assert "license" not in front
    assert "a local folder, `my-model`" in body_of(document)


@pytest.mark.parametrize(
    ("stated", "on_hub", "expected"),
    [
        ({"license": "mit"}, False, {"license": "mit"}),
        ({"license": "Apache-2.0"}, False, {"license": "apache-2.0"}),
        ({"license": ["mit", "gpl-3.0"]}, False, {"license": ["mit", "gpl-3.0"]}),
        ({"license": "llama9"}, True, {"license": "llama9"}),
        (
            {"license": "llama9"},
            False,
            {"license": "other", "license_name": "llama9", "license_link": "LICENSE"},
        ),
        (
            {"license": "My Own: v1.2"},
            True,
            {"license": "other", "license_name": "my-own-v1.2", "license_link": "LICENSE"},
        ),
        (
            {"license": "other", "license_name": "My+Own Licence"},
            True,
            {"license": "other", "license_name": "my-own-licence"},
        ),
        (
            {"license_name": "x", "license_link": "TERMS.md"},
            True,
            {
                "license": "other",
                "license_name": "x",
                "license_link": f"https://huggingface.co/org/Tiny-7b-hf/blob/{COMMIT}/TERMS.md",
            },
        ),
        (
            {"license": "llama2", "license_link": "LICENSE"},
            True,
            {"license": "llama2", "license_link": "LICENSE"},
        ),
        ({"license": "other"}, True, {"license": "other", "license_name": "see-link"}),
        ({}, True, {}),
    ],
)
def test_licences_are_such_as_the_hub_takes(
    stated: Any, on_hub: bool, expected: dict[str, Any]
) -> None:
    document = full()
    document["source"]["card"] = stated
    if not on_hub:
        document["source"]["repo_id"] = None
    front = front_of(document)
    assert expected.items() <= front.items()
    assert ("license" in front) == bool(expected)
    assert front.get("license") != "other" or front["license_link"]
    findings = card.lint(card.render(document).decode(), manifest=document)
    assert [f for f in findings if f.check.startswith("license") and f.level == "error"] == [
        f for f in findings if f.check == "license" and "llama9" in f.message
    ]


def test_a_prompt_that_was_cut_says_where_the_rest_is() -> None:
    document = full()
    document["source"]["card"]["extra_gated_prompt"] = "word " * 1000
    prompt = front_of(document)["extra_gated_prompt"]
    assert prompt.endswith("word… The whole text: https://huggingface.co/org/Tiny-7b-hf")
    assert len(prompt) < 2100


@pytest.mark.parametrize(
    "change",
    [
        {"truncated": "first 2 blocks: the whole model does not fit here"},
        {"text": "random tokens (no tokenizer)"},
        {"perplexity": None},
        {"perplexity": float("inf")},
    ],
)
def test_no_result_that_means_nothing_gets_into_the_model_index(change: Any) -> None:
    document = full()
    reload(document)["data"] |= change
    assert "model-index" not in front_of(document)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────


def first_line(document: Any) -> str:
    return body_of(document).lstrip("\n").splitlines()[0]


def test_a_verified_card_begins_with_its_title() -> None:
    assert first_line(full()) == "# Tiny-7b-hf, AQLM 2-bit"
    assert "Validation: **verified**" in body_of(full())


def test_a_checked_card_says_so_first_and_why() -> None:
    document = full()
    document["validation"]["verdict"] = "checked"
    reload(document).update(checks=[], skipped="aqlm has no kernel for a CPU", data={})
    line = first_line(document)
    assert line.startswith("> **Checked, not verified**")
    assert "`aqlm has no kernel for a CPU`" in line
    assert "Validation: **checked**" in body_of(document)
    assert "Run on this checkpoint: none." in body_of(document)


@pytest.mark.parametrize("reports", [[], None, "all", [{"level": "contract", "checks": []}]])
def test_an_unproved_card_says_so_first(reports: Any) -> None:
    document = full()
    document["validation"] = {"verdict": None, "reports": reports}
    assert first_line(document).startswith("> ⚠️ **Unverified")
    assert "Validation: **none**" in body_of(document)


def test_the_verdict_is_not_taken_on_trust() -> None:
    """A manifest that says "verified" of reports that do not."""
    failed = full()
    reload(failed)["checks"].append({"name": "x", "passed": False, "detail": ""})
    assert first_line(failed).startswith("> ⚠️ **Failed validation: do not use")
    empty = full()
    empty["validation"]["reports"][1]["checks"] = []
    assert first_line(empty).startswith("> ⚠️ **Unverified")
    missing = full()
    del missing["validation"]["reports"][0]
    assert first_line(missing).startswith("> ⚠️ **Unverified")
    skipped = full()
    reload(skipped).update(checks=[], skipped="too large")
    assert first_line(skipped).startswith("> **Checked")


# ── body ─────────────────────────────────────────────────────────────────────────────────────


def test_every_figure_is_on_the_page() -> None:
    text = body_of(full())
    for fact in (
        "**2.07 effective bits per weight**",
        "2.93 over the whole model",
        '"me/Tiny-7b-hf-AQLM-2bit", "cuda", torch.bfloat16',
        "| source weights | 14,000,000,000 | 14.0 GB |",
        "| weights here | 2,500,000,000 | 2.5 GB, 82.1 % less |",
        "| loaded, on `NVIDIA H100` | 2,600,000,000 | 2.6 GB |",
        "| peak while it ran, on `NVIDIA H100` | 3,100,000,000 | 3.1 GB |",
        "| peak of the conversion, at most, in one thread | 9,000,000,000 | 9.0 GB |",
        "| perplexity | 6.5 | 7.125 |",
        "| KL divergence from the source, nats per token |  | 0.25 |",
        "| same most likely next token |  | 81.2 % |",
        "2,048 tokens of `held-out text heldout.txt`",
        "seed 0",
        "    prompt     Once upon\n    source     a time\n               there was\n"
        "    quantized  a time there is\n",
        "2 with bits 2, num codebooks 2; 1 with bits 3, num codebooks 3",
        "| not a linear layer | 8 | `model.layers.0.input_layernorm.weight` |",
        "| `--skip 'down_proj'` | 3 | `model.layers.0.mlp.down_proj.weight` |",
        "`transformers 5.23.0 LlamaForCausalLM.from_pretrained` on `cuda`",
        f"https://huggingface.co/org/Tiny-7b-hf/tree/{COMMIT}",
        "asked for as `org/Tiny-7b`",
        f"```bash\nqconvert aqlm org/Tiny-7b-hf --revision {COMMIT} --bits 2\n```",
        f"| source | `model-00001-of-00002.safetensors` | `{SHA}` |",
        f"| here | `model.safetensors` | `{SHA[::-1]}` |",
        "`torch 2.13.0`",
    ):
        assert fact in text


def test_what_is_measured_on_a_part_is_not_told_of_the_whole() -> None:
    document = full()
    reload(document)["data"]["truncated"] = "first 2 blocks: the whole model does not fit here"
    text = body_of(document)
    assert "**Measured on a part of the model** (`first 2 blocks" in text
    assert "NVIDIA H100` |" not in text


def test_long_lists_are_cut_with_a_pointer() -> None:
    document = full()
    document["files"] |= {f"model-{i:05}-of-00099.safetensors": SHA for i in range(99)}
    text = body_of(document)
    assert "| here | and 80 more | in the manifest |" in text
    assert text.count("| here |") == 21


def test_the_plot_is_linked_where_it_is() -> None:
    document = full()
    assert "the worst ([all](qconvert-errors.svg)):" in body_of(document)
    del document["files"]["qconvert-errors.svg"]
    assert "of 2 layers; the worst:" in body_of(document)


def test_growth_is_no_saving() -> None:
    document = full()
    document["plan"]["weight_bytes"] = 15_400_000_000
    assert "| weights here | 15,400,000,000 | 15.4 GB, 10.0 % more |" in body_of(document)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, list) else ()
    )  # fmt: skip
    return [path, *(p for key, item in items for p in leaves(item, (*path, key)))]


def test_a_manifest_may_lack_anything_or_hold_anything() -> None:
    """Every key left out, and every value of every other type, one at a time."""
    paths = [path for path in leaves(full()) if path]
    others: list[Any] = [None, 0, -1, 1e308, True, "", "x", [], {}, [None], {"x": None}, 10**30]
    rng = random.Random(0)
    assert len(paths) > 150
    for path in paths:
        for value in (..., rng.choice(others)):
            document = full()
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            if value is ... and isinstance(parent, dict):
                del parent[path[-1]]
            else:
                parent[path[-1]] = None if value is ... else value
            assert card.render(document).startswith(b"---\n")
    for document in ({}, None, [], "x", {"source": []}):
        assert b"Unverified" in card.render(document)


def test_a_card_is_a_function_of_the_manifest() -> None:
    document = full()
    shuffled = json.loads(json.dumps(document, sort_keys=True))
    assert card.render(shuffled) == card.render(document)
    assert document == full()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("org/name", True), ("gpt2", True), ("a/b.c-d_e", True), ("", False), ("a/b/c", False),
        ("../b", False), ("a/b ", False), ("a/b\n", False), ("a--b/c", False), (None, False),
        ("a/" + "b" * 97, False), ("a/.b", False), ("a/b?x", False), ("ä/b", False),
    ],
)  # fmt: skip
def test_ids_are_ids(value: Any, expected: bool) -> None:
    assert (as_repo_id(value) is not None) == expected


def test_the_card_of_a_real_conversion(tmp_path: Path) -> None:
    source = shutil.copytree(open_checkpoint("demo").root, tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: no\nwidget: x\n---\n<b>Bold</b>"
    )
    qconvert.convert(str(source), "int8", output=tmp_path / "out", validate=False)
    text = (tmp_path / "out" / "README.md").read_text()
    document = manifest.read(tmp_path / "out")
    assert document is not None
    assert text == card.render(document).decode()
    front = front_of(document)
    assert (front["license"], front["language"]) == ("mit", "no")
    assert "Bold" not in text
    assert "widget" not in text
    shards = {name: sha for name, sha in document["files"].items() if "safetensors" in name}
    assert Facts(document).weights_sha256 == shards
    assert len(shards) == 1
    assert re.search(r"```bash\nqconvert int8 source\n```", text)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    findings = card.lint(text, manifest=document, files=names)
    assert [(f.level, f.check) for f in findings] == [("warning", "base_model")]
