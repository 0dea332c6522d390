"""The front matter of a card: what the Hub's machinery reads."""

from __future__ import annotations

import re
from typing import Any

from qconvert import upstream
from qconvert.card import licences
from qconvert.card.facts import Facts, as_number, as_text
from qconvert.types import JSON

_SIMPLE = re.compile(r"[A-Za-z][A-Za-z0-9._/+-]*( [A-Za-z0-9._/+-]+)*")
_TAG = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_FULL_PROMPT = " The whole text: https://huggingface.co/"


def front_matter(facts: Facts) -> JSON:
    """The front matter of a result as a JSON value."""
    stated = facts.stated
    files = facts.mapping("files")
    data: JSON = {"base_model": facts.source_id} if facts.source_id else {}
    data |= {} if facts.dequantized else {"base_model_relation": "quantized"}
    data["library_name"] = "transformers"
    if task := stated.get("pipeline_tag") or _task(facts):
        data["pipeline_tag"] = task
    data |= licences.stated(stated, source_id=facts.source_id, commit=facts.commit, files=files)
    data |= {key: value for key, value in stated.items() if key == "language"}
    data |= {key: value for key, value in stated.items() if key.startswith("extra_gated_")}
    if "extra_gated_fields" in data:
        data["extra_gated_fields"] = dict(data["extra_gated_fields"])
    prompt = data.get("extra_gated_prompt", "")
    if prompt.endswith("…") and facts.source_id:
        data["extra_gated_prompt"] = prompt + _FULL_PROMPT + facts.source_id
    if not facts.dequantized:
        data["quantized_by"] = "qconvert"
    data["tags"] = _tags(facts)
    if index := _model_index(facts):
        data["model-index"] = index
    return data


def dump(data: JSON) -> str:
    """YAML that a reader of version 1.1 and one of version 1.2 take for the same.

    What is not a plain word is quoted: to one of them `1e5` is a number, to the other a text.
    """
    import yaml  # 20 ms

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = None if _SIMPLE.fullmatch(value) else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(
        yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    )


def _task(facts: Facts) -> str:
    """What the model was seen to do: it has a perplexity if it predicts the next token."""
    found = facts.measured("reload").get("perplexity")
    return "" if as_number(found) is None else "text-generation"


def _tags(facts: Facts) -> list[str]:
    bits = facts.number("method", "bits")
    if facts.dequantized:
        return ["qconvert"]
    tags = ["qconvert", facts.container, *([] if facts.transcoded else [facts.verb])]
    tags += [f"{bits:g}-bit"] if bits is not None else []
    return list(dict.fromkeys(tag for tag in tags if _TAG.fullmatch(tag)))


def _model_index(facts: Facts) -> list[JSON]:
    """Perplexity and KL divergence, if they are the whole model's, on a text and no random tokens.

    In the shape that `huggingface_hub.ModelCard` reads as `eval_results`.
    """
    data = facts.measured("reload")
    text = as_text(data.get("text"))
    perplexity, divergence = as_number(data.get("perplexity")), as_number(data.get("kl_divergence"))
    if perplexity is None or not facts.whole or not text.startswith("held-out"):
        return []
    metrics: list[JSON] = [{"type": "perplexity", "value": perplexity, "name": "Perplexity"}]
    if divergence is not None:
        title = "KL divergence from the source, nats per token"
        metrics.append({"type": "kl_divergence", "value": divergence, "name": title})
    dataset: JSON = {"name": upstream.text(text), "type": "held-out"}
    if (tokens := as_number(data.get("tokens"))) is not None:
        dataset["args"] = {"tokens": tokens}
    task = {"type": "text-generation", "name": "Text Generation"}
    results = [{"task": task, "dataset": dataset, "metrics": metrics}]
    return [{"name": _index_name(facts), "results": results}]


def _index_name(facts: Facts) -> str:
    name = (facts.target_id or facts.title).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:96].strip("-.") or "model"
