"""Does a card say what it should, in a form that the Hub takes, and nothing else?

Works on the card of anybody's repository. Where a manifest lies beside it, the card must not say
anything else than the manifest does: every figure of ours is looked up in the card that would be
rendered from it. Errors are what the Hub refuses or what misleads a reader; the rest are warnings.
Each finding brings the line to paste.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from qconvert import strictyaml
from qconvert.card import evidence, licences, page
from qconvert.card.facts import Facts, as_mapping, as_repo_id
from qconvert.card.front import dump, front_matter
from qconvert.card.markdown import code
from qconvert.errors import CorruptFile, printable
from qconvert.types import JSON

ERROR, WARNING = "error", "warning"
MAX_CHARS = 500_000
_MOST = 5
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*|code|multilingual")
_VERDICT = re.compile(r"Validation: \*\*(\w+)\*\*")
_BITS = re.compile(r"([0-9.]+) effective bits per weight")
_EXAMPLE = "base_model: ORG/NAME\nbase_model_relation: quantized\nlibrary_name: transformers"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a card that is wrong (`error`) or could be better (`warning`)."""

    level: str
    check: str
    message: str
    fix: str = ""
    """Lines to paste, into the front matter unless the message says otherwise."""


def lint(
    text: str, *, manifest: JSON | None = None, files: Collection[str] | None = None
) -> list[Finding]:
    """What is wrong with the text of a README.md; errors first.

    `manifest`: the one beside it, if there is one. `files`: the names of what lies beside it, if
    that is known. Never raises for what the text or the manifest hold.
    """
    if len(text) > MAX_CHARS:
        what = f"more than {MAX_CHARS:,} characters: not looked at"
        return [Finding(ERROR, "size", what)]
    facts = Facts(manifest) if manifest is not None else None
    yaml, body = strictyaml.split(text)
    found = [*_front(yaml, facts, files), *_body(body, facts, files)]
    return sorted(found, key=lambda finding: finding.level != ERROR)


# ── front matter ─────────────────────────────────────────────────────────────────────────────


def _front(
    yaml: str | None, facts: Facts | None, files: Collection[str] | None
) -> Iterator[Finding]:
    whole = f"---\n{dump(front_matter(facts)) if facts else _EXAMPLE + chr(10)}---"
    if yaml is None:
        what = "there is no front matter between two lines of ---, so the Hub knows nothing of it"
        yield Finding(ERROR, "front matter", what, whole)
        return
    try:
        data = strictyaml.loads(yaml, file=page.NAME, line=2)
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
        yield Finding(ERROR, "base_model", f"{_shown(value)} is no id of a model on the Hub", fix)
    elif known and ids != [known]:
        what = f"{_shown(value)} is not what the manifest says it was made from, {known}"
        yield Finding(ERROR, "base_model", what, fix)
    relation = data.get("base_model_relation")
    if relation != "quantized":
        level = WARNING if relation is None else ERROR
        said = "is missing" if relation is None else f"is {_shown(relation)}"
        what = f"base_model_relation {said}: the Hub may file it under another branch of its tree"
        yield Finding(level, "base_model_relation", what, "base_model_relation: quantized")


def _library(data: JSON) -> Iterator[Finding]:
    value = data.get("library_name")
    if value is None:
        what = "library_name is missing: the Hub offers no way to load it"
        yield Finding(WARNING, "library_name", what, "library_name: transformers")
    elif not isinstance(value, str):
        what = f"{_shown(value)} is no name of a library"
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
            what = f"{_shown(word)} is not on the Hub's list, which refuses such a card"
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
        what = f"{_shown(link)} is neither an address nor the name of a file beside the card"
        yield Finding(ERROR, "license_link", what, fix)
    elif "://" not in link and files is not None and link not in files:
        yield Finding(ERROR, "license_link", f"there is no file {_shown(link)} here", fix)


def _licence_of_source(data: JSON, facts: Facts) -> Iterator[Finding]:
    expected = front_matter(facts)
    for key in ("license", "license_name"):
        wanted = expected.get(key)
        if wanted is not None and data.get(key) != wanted:
            what = f"{_shown(data.get(key))}, but the source's card comes to {_shown(wanted)}"
            yield Finding(ERROR, key, what, dump({key: wanted}).rstrip())


def _task(data: JSON) -> Iterator[Finding]:
    value = data.get("pipeline_tag")
    if value is not None and not (isinstance(value, str) and _TASK.fullmatch(value)):
        what = f"{_shown(value)} is no name of a task"
        yield Finding(ERROR, "pipeline_tag", what, "pipeline_tag: text-generation")


def _language(data: JSON) -> Iterator[Finding]:
    value = data.get("language")
    for item in value if isinstance(value, list) else [value] if value is not None else []:
        if not (isinstance(item, str) and _LANGUAGE.fullmatch(item)):
            what = f"{_shown(item)} is no ISO 639 code of a language"
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
            what = f"{kind} is {_shown(said[kind])}, the manifest says {value}"
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


# ── body ─────────────────────────────────────────────────────────────────────────────────────


def _body(body: str, facts: Facts | None, files: Collection[str] | None) -> Iterator[Finding]:
    from markdown_it import MarkdownIt  # rich's own parser; 30 ms

    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(body)
    yield from _html(tokens, facts)
    if files is not None:
        yield from _links(tokens, files)
    if facts is None:
        if not re.search(r"perplexity|KL divergence|verified|validat", body, re.IGNORECASE):
            what = "the card says neither what was tested nor how good it is"
            fix = "qconvert validate PATH --against SOURCE  # a command, not a line of the card"
            yield Finding(WARNING, "verdict", what, fix)
        return
    yield from _verdict(body, facts)
    yield from _figures(parser, body, tokens, facts)


def _html(tokens: Any, facts: Facts | None) -> Iterator[Finding]:
    found = [
        token.content
        for token in _flat(tokens)
        if token.type in ("html_block", "html_inline") and not token.content.startswith("<!--")
    ]
    if found:
        level = WARNING if facts is None else ERROR
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        what = f"raw HTML in the body: {printable(found[0].strip(), 80)}{more}"
        yield Finding(level, "html", what, "")


def _links(tokens: Any, files: Collection[str]) -> Iterator[Finding]:
    for token in _flat(tokens):
        target = token.attrs.get("href") or token.attrs.get("src")
        if token.type not in ("link_open", "image") or not target:
            continue
        name = unquote(str(target)).partition("#")[0].partition("?")[0].removeprefix("./")
        if name and not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", name) and name not in files:
            what = f"a link to {_shown(name)}, which is not here"
            yield Finding(ERROR, "links", what, "")


def _verdict(body: str, facts: Facts) -> Iterator[Finding]:
    expected, first = evidence.verdict(facts), evidence.warning(facts)
    word = facts.verdict or "none"
    said = set(_VERDICT.findall(body))
    if not said:
        yield Finding(ERROR, "verdict", "the card does not say its verdict", expected)
    elif said != {word}:
        what = f"the card says {' and '.join(sorted(said))}, the manifest comes to {word}"
        yield Finding(ERROR, "verdict", what, expected)
    head = next((line for line in body.splitlines() if line.strip()), "")
    if first and not head.startswith(first[:20]):
        what = f"the first line of the body does not say that it is {word}"
        yield Finding(ERROR, "verdict", what, first)


def _figures(parser: Any, body: str, tokens: Any, facts: Facts) -> Iterator[Finding]:
    """Rows of ours that say something else than the manifest."""
    ours = [row for section in page.figures(facts) for row in _rows(parser.parse(section))]
    theirs = list(_rows(tokens))
    firsts = [row[0] for row in ours]
    wrong = 0
    for row in ours:
        length = 1 if firsts.count(row[0]) == 1 else 2
        rivals = [other for other in theirs if other[:length] == row[:length]]
        if rivals and row not in rivals:
            wrong += 1
            label, said, wanted = row[0], rivals[0][length:], row[length:]
            what = f"{printable(label, 60)}: {_cells(said)}, the manifest says {_cells(wanted)}"
            if wrong <= _MOST:
                yield Finding(ERROR, "figures", what, f"| {' | '.join(row)} |")
    bits = _BITS.findall(page.effective_bits(facts))
    for value in _BITS.findall(body):
        if bits and value != bits[0]:
            what = f"{value} effective bits per weight, the manifest says {bits[0]}"
            yield Finding(ERROR, "figures", what, "")


def _cells(cells: tuple[str, ...]) -> str:
    return printable(" ".join(cell for cell in cells if cell) or "nothing", 120)


def _rows(tokens: Any) -> Iterator[tuple[str, ...]]:
    """The cells of every row of every table, as written."""
    row: list[str] = []
    inside = False
    for token in tokens:
        if token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "td_close"):
            inside = token.type == "td_open"
        elif token.type == "inline" and inside:
            row.append(token.content)
        elif token.type == "tr_close" and row:
            yield tuple(row)


def _flat(tokens: Any) -> Iterator[Any]:
    for token in tokens:
        yield token
        yield from _flat(token.children or ())


def _shown(value: Any) -> str:
    return code(value, 80) if isinstance(value, str) else printable(repr(value), 80)
