"""Lint of the front matter: does the Hub take it, and does it name the right model and licence?"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from qconvert import strictyaml
from qconvert.card import licences
from qconvert.card.facts import Facts, as_mapping, as_repo_id
from qconvert.card.findings import ERROR, WARNING, Finding, shown
from qconvert.card.front import dump, front_matter
from qconvert.errors import CorruptFile
from qconvert.naming import CARD_NAME
from qconvert.types import JSON

_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*|code|multilingual")
_LEAST = "base_model: ORG/NAME\nbase_model_relation: quantized\nlibrary_name: transformers\n"


def check_front(
    yaml: str | None, facts: Facts | None, files: Collection[str] | None
) -> Iterator[Finding]:
    whole = f"---\n{dump(front_matter(facts)) if facts else _LEAST}---"
    if yaml is None:
        what = "there is no front matter between two lines of ---, so the Hub knows nothing of it"
        yield Finding(ERROR, "front matter", what, whole)
        return
    try:
        data = strictyaml.loads(yaml, file=CARD_NAME, line=2)
    except CorruptFile as error:
        yield Finding(ERROR, "front matter", str(error), whole if facts else "")
        return
    yield from _base_model(data, facts)
    yield from _library(data)
    yield from _licence(data, facts, files)
    yield from _task(data)
    yield from _language(data)
    yield from _model_index(data, facts)


def _base_model(data: JSON, facts: Facts | None) -> Iterator[Finding]:
    value = data.get("base_model")
    ids = value if isinstance(value, list) else [value]
    known = facts.source_id if facts else None
    fix = f"base_model: {known or 'ORG/NAME'}"
    if value is None:
        local = facts is not None and known is None
        what = "base_model is missing: nobody finds this repository from its model's page"
        yield Finding(WARNING if local else ERROR, "base_model", what, fix)
    elif not ids or not all(as_repo_id(item) for item in ids):
        yield Finding(ERROR, "base_model", f"{shown(value)} is no id of a model on the Hub", fix)
    elif known and ids != [known]:
        what = f"{shown(value)} is not what the manifest says it was made from, {known}"
        yield Finding(ERROR, "base_model", what, fix)
    relation = data.get("base_model_relation")
    if relation != "quantized" and not (facts and facts.dequantized):
        level = WARNING if relation is None else ERROR
        said = "is missing" if relation is None else f"is {shown(relation)}"
        what = f"base_model_relation {said}: the Hub may file it under another branch of its tree"
        yield Finding(level, "base_model_relation", what, "base_model_relation: quantized")


def _library(data: JSON) -> Iterator[Finding]:
    value = data.get("library_name")
    if value is None:
        what = "library_name is missing: the Hub offers no way to load it"
        yield Finding(WARNING, "library_name", what, "library_name: transformers")
    elif not isinstance(value, str):
        what = f"{shown(value)} is no name of a library"
        yield Finding(ERROR, "library_name", what, "library_name: transformers")


def _licence(data: JSON, facts: Facts | None, files: Collection[str] | None) -> Iterator[Finding]:
    value, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    words = value if isinstance(value, list) else [value]
    beside = sorted(file for file in files or () if licences.TEXT.fullmatch(file))
    if value is None:
        what = "license is missing: nobody knows what the weights may be used for"
        yield Finding(WARNING, "license", what, "license: ID  # the one of the source's card")
    for word in words if value is not None else []:
        if word not in licences.KNOWN:
            slug = licences.slug(word) if isinstance(word, str) else ""
            what = f"{shown(word)} is not on the Hub's list, which refuses such a card"
            if isinstance(word, str) and word.lower() in licences.KNOWN:
                yield Finding(ERROR, "license", what, f"license: {word.lower()}")
            else:
                fix = f"license: other\nlicense_name: {slug or 'NAME'}\nlicense_link: LICENSE"
                yield Finding(ERROR, "license", what, fix)
    if "other" in words and not (isinstance(name, str) and name):
        what = "license: other needs license_name"
        yield Finding(ERROR, "license_name", what, "license_name: NAME-OF-THE-LICENCE")
    if "other" in words and not link:
        what = "license: other needs license_link, or nobody can read the terms"
        fix = f"license_link: {beside[0] if beside else 'https://…'}"
        yield Finding(WARNING if beside else ERROR, "license_link", what, fix)
    if link is not None:
        yield from _licence_link(link, files, beside)
    if facts is not None:
        yield from _licence_of_source(data, facts)


def _licence_link(link: Any, files: Collection[str] | None, beside: list[str]) -> Iterator[Finding]:
    fix = f"license_link: {beside[0] if beside else 'https://…'}"
    if not isinstance(link, str) or not re.fullmatch(r"https?://\S+|[\w.-]+", link):
        what = f"{shown(link)} is neither an address nor the name of a file beside the card"
        yield Finding(ERROR, "license_link", what, fix)
    elif "://" not in link and files is not None and link not in files:
        yield Finding(ERROR, "license_link", f"there is no file {shown(link)} here", fix)


def _licence_of_source(data: JSON, facts: Facts) -> Iterator[Finding]:
    expected = front_matter(facts)
    for key in ("license", "license_name"):
        wanted = expected.get(key)
        if wanted is not None and data.get(key) != wanted:
            what = f"{shown(data.get(key))}, but the source's card comes to {shown(wanted)}"
            yield Finding(ERROR, key, what, dump({key: wanted}).rstrip())


def _task(data: JSON) -> Iterator[Finding]:
    value = data.get("pipeline_tag")
    if value is not None and not (isinstance(value, str) and _TASK.fullmatch(value)):
        what = f"{shown(value)} is no name of a task"
        yield Finding(ERROR, "pipeline_tag", what, "pipeline_tag: text-generation")


def _language(data: JSON) -> Iterator[Finding]:
    value = data.get("language")
    for item in value if isinstance(value, list) else [value] if value is not None else []:
        if not (isinstance(item, str) and _LANGUAGE.fullmatch(item)):
            what = f"{shown(item)} is no ISO 639 code of a language"
            yield Finding(WARNING, "language", what, "language: en")


def _model_index(data: JSON, facts: Facts | None) -> Iterator[Finding]:
    index = data.get("model-index")
    if index is not None and (problem := _malformed(index)):
        what = f"{problem}: the Hub refuses it, and huggingface_hub cannot read the card"
        yield Finding(ERROR, "model-index", what, "")
        return
    if facts is None:
        return
    expected = front_matter(facts).get("model-index")
    if expected is None:
        return
    fix = dump({"model-index": expected}).rstrip()
    if index is None:
        yield Finding(WARNING, "model-index", "the measured perplexity is not in it", fix)
        return
    said = {metric["type"]: metric["value"] for metric in _metrics(index)}
    for metric in _metrics(expected):
        kind, value = metric["type"], metric["value"]
        if said.get(kind, value) != value:
            what = f"{kind} is {shown(said[kind])}, the manifest says {value}"
            yield Finding(ERROR, "model-index", what, fix)


def _metrics(index: Any) -> Iterator[JSON]:
    for model in index:
        for result in model["results"]:
            yield from result["metrics"]


def _malformed(index: Any) -> str:
    """What is missing in a model-index for huggingface_hub to read it; "" if nothing is."""
    if not isinstance(index, list) or not index:
        return "no list of models"
    for model in map(as_mapping, index):
        results = model.get("results")
        if not isinstance(model.get("name"), str) or not isinstance(results, list):
            return "a model without name and results"
        for result in map(as_mapping, results):
            task, dataset = as_mapping(result.get("task")), as_mapping(result.get("dataset"))
            metrics = result.get("metrics")
            if not task.get("type"):
                return "a result without task.type"
            if not dataset.get("type") or not dataset.get("name"):
                return "a result without dataset.type and dataset.name"
            if not isinstance(metrics, list) or not metrics:
                return "a result without metrics"
            for metric in map(as_mapping, metrics):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    return "a metric without type and value"
                value = metric["value"]
                if isinstance(value, float) and not math.isfinite(value):
                    return f"{metric['type']} is not a finite number"
    return ""
