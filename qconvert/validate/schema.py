"""The part of JSON Schema that formats/*/quantization_config.schema.json is written in.

The jsonschema library knows all of it and takes 0.15 s to import, a third of what a contract
check of the demo may take; these schemas are a table of keys, types and allowed values. A keyword
that is not known here is an error and never a pass; the tests compare every verdict with the
library's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from reprlib import repr as shortened
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_ANNOTATIONS = {
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "title",
    "description",
    "default",
    "examples",
}


def violations(value: Any, schema: Any, path: str = "") -> Iterator[str]:
    """What of `value` is not as `schema` says: "path: expected …, got …", nothing if all is."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{path}: not allowed"
        return
    for keyword, rule in schema.items():
        if keyword not in _ANNOTATIONS:
            yield from _violations(keyword, rule, value, schema, path)


def _violations(
    keyword: str, rule: Any, value: Any, schema: dict[str, Any], path: str
) -> Iterator[str]:
    def expected(what: object) -> str:
        return f"{path or 'quantization_config'}: expected {what}, got {shortened(value)}"

    match keyword:
        case "type":
            names = [rule] if isinstance(rule, str) else rule
            if not any(_is(value, name) for name in names):
                yield expected(" or ".join(names))
        case "const" if not _same(value, rule):
            yield expected(shortened(rule))
        case "enum" if not any(_same(value, allowed) for allowed in rule):
            yield expected(f"one of {', '.join(map(str, rule))}")
        case "minimum" if _is(value, "number") and value < rule:
            yield expected(f"≥ {rule}")
        case "maximum" if _is(value, "number") and value > rule:
            yield expected(f"≤ {rule}")
        case "required" if isinstance(value, dict):
            yield from (f"{path}.{key}: missing".lstrip(".") for key in rule if key not in value)
        case "properties" if isinstance(value, dict):
            for key in rule.keys() & value.keys():
                yield from violations(value[key], rule[key], f"{path}.{key}".lstrip("."))
        case "patternProperties" if isinstance(value, dict):
            for pattern, part in rule.items():
                for key in (key for key in value if re.search(pattern, key)):
                    yield from violations(value[key], part, f"{path}.{key}".lstrip("."))
        case "additionalProperties" if isinstance(value, dict):
            patterns = schema.get("patternProperties", ())
            for key in value.keys() - schema.get("properties", {}).keys():
                if not any(re.search(pattern, key) for pattern in patterns):
                    yield from violations(value[key], rule, f"{path}.{key}".lstrip("."))
        case "minLength" if isinstance(value, str) and len(value) < rule:
            yield expected(f"{rule} characters or more")
        case "uniqueItems" if rule and isinstance(value, list):
            if any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
                yield expected("different items")
        case "items" if isinstance(value, list):
            for index, item in enumerate(value):
                yield from violations(item, rule, f"{path}[{index}]")
        case "allOf":
            for part in rule:
                yield from violations(value, part, path)
        case "anyOf" | "oneOf":
            passed = sum(not any(violations(value, part, path)) for part in rule)
            if passed == 0 or (keyword == "oneOf" and passed > 1):
                yield expected(f"{'one' if keyword == 'oneOf' else 'any'} of {len(rule)} forms")
        case "if":
            branch = "else" if any(violations(value, rule, path)) else "then"
            yield from violations(value, schema.get(branch, True), path)
        case "not" if not any(violations(value, rule, path)):
            yield expected(f"not {shortened(rule)}")
        case _ if keyword not in _KEYWORDS:
            raise ValueError(f"unknown keyword {keyword!r} in a schema of formats/")


_KEYWORDS = {
    "type", "const", "enum", "minimum", "maximum", "required", "properties", "not",
    "patternProperties", "additionalProperties", "items", "minLength", "uniqueItems",
    "allOf", "anyOf", "oneOf", "if", "then", "else",
}  # fmt: skip


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(value: Any, other: Any) -> bool:
    """JSON equality: 1 and 1.0 are the same number, 1 and true are not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
