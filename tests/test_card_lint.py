"""`qconvert card --lint`: what it says of cards that are wrong, and that ours are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qconvert import card, strictyaml
from qconvert.cli import card_verb
from qconvert.errors import ContractViolation, NotFound
from tests.card_cases import full

FOREIGN = """\
---
license: apache-2.0
base_model: org/model
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
language: en
model-index:
- name: model-awq
  results:
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText}
    metrics:
    - {type: perplexity, value: 5.5}
---
# model, quantized

Perplexity 5.5, see [the table](RESULTS.md) and [the paper](https://arxiv.org/abs/2306.00978#top).
"""
FILES = ["README.md", "RESULTS.md", "LICENSE", "model.safetensors"]


def found(text: str, manifest: Any = None, files: Any = FILES) -> list[tuple[str, str]]:
    return [(f.level, f.check) for f in card.lint(text, manifest=manifest, files=files)]


def names() -> list[str]:
    return [*full()["files"], "qconvert-manifest.json"]


def test_good_cards_pass() -> None:
    assert found(FOREIGN) == []
    assert found(card.render(full()).decode(), full(), names()) == []
    for verdict, skipped in (("checked", "no kernel"), (None, "")):
        document = full()
        document["validation"]["verdict"] = verdict
        document["validation"]["reports"][2].update(checks=[], skipped=skipped, data={})
        assert found(card.render(document).decode(), document, names()) == []


@pytest.mark.parametrize(
    ("old", "new", "expected", "fix"),
    [
        (FOREIGN, "# no front matter, perplexity 5", ("error", "front matter"), "---\nbase_model"),
        ("language: en", "license: mit", ("error", "front matter"), ""),
        ("language: en", "language: [en", ("error", "front matter"), ""),
        ("language: en", "x: &a [*a]", ("error", "front matter"), ""),
        ("base_model: org/model\n", "", ("error", "base_model"), "base_model: ORG/NAME"),
        ("org/model\n", "https://huggingface.co/org/model\n", ("error", "base_model"), "base_"),
        ("org/model\n", "[org/model, ../x]\n", ("error", "base_model"), "base_"),
        ("base_model: org/model\n", "base_model: []\n", ("error", "base_model"), "base_"),
        (
            "base_model_relation: quantized\n", "", ("warning", "base_model_relation"),
            "base_model_relation: quantized",
        ),
        ("relation: quantized", "relation: finetune", ("error", "base_model_relation"), "base_"),
        ("library_name: transformers\n", "", ("warning", "library_name"), "library_name: transf"),
        ("name: transformers", "name: [a]", ("error", "library_name"), "library_"),
        ("license: apache-2.0\n", "", ("warning", "license"), "license: "),
        ("license: apache-2.0", "license: Apache-2.0", ("error", "license"), "license: apache-2.0"),
        ("license: apache-2.0", "license: My Own v1", ("error", "license"), "name: my-own-v1"),
        ("license: apache-2.0", "license: 1.0", ("error", "license"), "license: other"),
        (
            "license: apache-2.0", "license: other\nlicense_link: LICENSE",
            ("error", "license_name"), "license_name: ",
        ),
        (
            "license: apache-2.0", "license: other\nlicense_name: x",
            ("warning", "license_link"), "license_link: LICENSE",
        ),
        (
            "license: apache-2.0", "license: other\nlicense_name: x\nlicense_link: TERMS",
            ("error", "license_link"), "license_link: LICENSE",
        ),
        (
            "license: apache-2.0", "license: mit\nlicense_link: javascript:x",
            ("error", "license_link"), "license_link: LICENSE",
        ),
        ("tag: text-generation", "tag: Text Generation", ("error", "pipeline_tag"), "pipeline"),
        ("language: en", "language: English language", ("warning", "language"), "language: en"),
        ("  - task: {type: text-generation}\n    d", "  - d", ("error", "model-index"), ""),
        ("- name: model-awq\n  results", "- results", ("error", "model-index"), ""),
        ("type: wikitext, name", "name", ("error", "model-index"), ""),
        ("value: 5.5", "valu: 5.5", ("error", "model-index"), ""),
        ("value: 5.5", "value: .nan", ("error", "model-index"), ""),
        ("# model", "<script>x</script>\n\n# model", ("warning", "html"), ""),
        ("# model", "# model <b>x</b>", ("warning", "html"), ""),
        ("RESULTS.md", "results.md", ("error", "links"), ""),
        ("[the table](RESULTS.md)", "![](a.png)", ("error", "links"), ""),
        (
            "Perplexity 5.5, see [the table](RESULTS.md) and", "See", ("warning", "verdict"),
            "qconvert validate",
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_found_alone_and_comes_with_a_fix(
    old: str, new: str, expected: tuple[str, str], fix: str
) -> None:
    assert old in FOREIGN
    findings = card.lint(FOREIGN.replace(old, new), files=FILES)
    assert [(f.level, f.check) for f in findings] == [expected]
    assert fix in findings[0].fix
    assert findings[0].message


def test_what_the_hubs_client_cannot_read_is_an_error() -> None:
    """And the other way round: what it reads has a sound model-index."""
    for old, new in (("type: wikitext, name", "name"), ("value: 5.5", "valu: 5.5")):
        with pytest.raises(ValueError, match="model_index"):
            ModelCard(FOREIGN.replace(old, new))
    assert ModelCard(FOREIGN).data.eval_results[0].metric_value == 5.5


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("base_model: org/Tiny-7b-hf", "base_model: other/Model", "base_model"),
        ("license_name: tiny-licence", "license_name: mit", "license_name"),
        ("license: other", "license: mit", "license"),
        ("value: 7.125", "value: 6.125", "model-index"),
        ("| perplexity | 6.5 | 7.125 |", "| perplexity | 6.5 | 6.6 |", "figures"),
        ("| 2.5 GB, 82.1 % less |", "| 1.5 GB, 82.1 % less |", "figures"),
        ("**2.07 effective bits", "**1.07 effective bits", "figures"),
        ("fedcba9876543210` |\n\nAll", "fedcba9876543211` |\n\nAll", "figures"),
        (".0.mlp.up_proj` | 0.02 |", ".0.mlp.up_proj` | 0.01 |", "figures"),
        ("Validation: **verified**", "Validation: **checked**", "verdict"),
        ("Validation: **verified**", "It is fine", "verdict"),
        ("# Tiny", "<b>x</b>\n\n# Tiny", "html"),
        ("(qconvert-errors.svg)", "(qconvert-error.svg)", "links"),
    ],
)  # fmt: skip
def test_a_card_says_what_the_manifest_says(old: str, new: str, check: str) -> None:
    text = card.render(full()).decode()
    assert old in text
    findings = found(text.replace(old, new), full(), names())
    assert findings == [("error", check)]


@pytest.mark.parametrize("verdict", ["checked", "failed", None])
def test_no_card_is_better_than_its_manifest(verdict: str | None) -> None:
    document = full()
    document["validation"]["verdict"] = verdict
    if verdict == "checked":
        document["validation"]["reports"][2].update(checks=[], skipped="too large")
    findings = card.lint(card.render(full()).decode(), manifest=document, files=names())
    verdicts = [f for f in findings if f.check == "verdict"]
    assert [f.level for f in verdicts] == ["error", "error"]
    assert f"comes to {verdict or 'none'}" in verdicts[0].message
    assert verdicts[1].fix.startswith("> ")


def test_a_card_that_somebody_added_to_is_fine() -> None:
    text = card.render(full()).decode()
    text = text.replace(
        "## Use", "My own words on [it](LICENSE).\n\n| a | b |\n|---|---|\n| c | 9 |\n\n## Use"
    )
    assert found(text, full(), names()) == []


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["none", "empty", "full"]))
def test_no_text_makes_it_raise(text: str, kind: str) -> None:
    manifest = {"none": None, "empty": {}, "full": full()}[kind]
    for words in (text, f"---\n{text}\n---\n{text}", FOREIGN + text):
        card.lint(words, manifest=manifest, files=FILES)
        card.lint(words, manifest=manifest)


def test_it_does_not_read_for_ever() -> None:
    for text in ("[" * 20_000, "![[" * 7_000, "`" * 20_000, "<" * 20_000, "|" * 9_000 + "\n|--|"):
        assert ("warning", "size") not in found(FOREIGN + text)
        assert ("warning", "size") in found(FOREIGN + text * 30)
        assert ("error", "size") in found(FOREIGN + text * 30, full())


# ── the verb ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run() -> Callable[..., Any]:
    app = typer.Typer()
    card_verb.register(app)
    app.callback()(lambda: None)
    return lambda *words: CliRunner().invoke(app, ["card", *words], env={"COLUMNS": "80"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    document = full()
    for name in document["files"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "README.md").write_bytes(card.render(document))
    (tmp_path / "qconvert-manifest.json").write_text(json.dumps(document))
    return tmp_path


def test_the_card_is_printed_as_it_would_be_written(run: Callable[..., Any], folder: Path) -> None:
    text = card.render(full()).decode()
    assert run(str(folder)).stdout == text
    assert json.loads(run(str(folder), "--json").stdout)["card"] == text


def test_lint_passes_and_fails_with_words_to_paste(run: Callable[..., Any], folder: Path) -> None:
    good = run(str(folder), "--lint")
    assert (good.exit_code, good.stdout) == (0, "✓ nothing is wrong with this card\n")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("license: other", "license: Weird Words"))
    bad = run(str(folder), "--lint")
    assert isinstance(bad.exception, ContractViolation)
    assert bad.exception.exit_code == 6
    assert "✗ license: 'Weird Words'" in bad.stdout
    assert "\n    license: other\n    license_name: weird-words\n" in bad.stdout
    data = json.loads(run(str(folder), "--lint", "--json").stdout)
    assert data["errors"] == len(data["findings"]) > 0
    assert {"level", "check", "message", "fix"} == data["findings"][0].keys()


def test_a_foreign_folder_can_be_linted_and_not_rendered(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(FOREIGN)
    (tmp_path / "RESULTS.md").write_text("x")
    assert run(str(tmp_path), "--lint").exit_code == 0
    (tmp_path / "RESULTS.md").unlink()
    assert isinstance(run(str(tmp_path), "--lint").exception, ContractViolation)
    error = run(str(tmp_path)).exception
    assert isinstance(error, NotFound)
    assert error.hint == f"qconvert card {tmp_path} --lint"


def test_a_folder_without_a_card(run: Callable[..., Any], folder: Path) -> None:
    (folder / "README.md").unlink()
    done = run(str(folder), "--lint")
    assert isinstance(done.exception, ContractViolation)
    assert f"qconvert card {folder} > {folder}/README.md" in done.stdout


def test_what_is_not_there_is_not_found(run: Callable[..., Any], folder: Path) -> None:
    assert isinstance(run(str(folder / "nowhere")).exception, NotFound)
    assert isinstance(run(str(folder / "README.md")).exception, NotFound)


def test_front_matter_of_the_fixture_is_read_alike() -> None:
    front, _ = strictyaml.split(FOREIGN)
    assert front is not None
    assert strictyaml.loads(front, file="x")["base_model"] == ModelCard(FOREIGN).data.base_model
