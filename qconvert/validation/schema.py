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


def violations(value: Any, schema: Any) -> Iterator[str]:
    """What of `value` is not as `schema` says: "key: expected …, got …", nothing if all is."""
    return _violations(value, schema, "", schema)


def _violations(value: Any, schema: Any, path: str, root: Any) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{path}: not allowed"
        return
    for keyword, rule in schema.items():
        if keyword not in _ANNOTATIONS:
            yield from _broken(keyword, rule, value, schema, path, root)


def _broken(
    keyword: str, rule: Any, value: Any, schema: dict[str, Any], path: str, root: Any
) -> Iterator[str]:
    def expected(what: object) -> str:
        return f"{path or 'quantization_config'}: expected {what}, got {shortened(value)}"

    def below(key: str) -> str:
        return f"{path}.{key}" if path else key

    def fails(part: Any) -> bool:
        return any(_violations(value, part, path, root))

    match keyword:
        case "$ref":
            yield from _violations(value, root["$defs"][rule.removeprefix("#/$defs/")], path, root)
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
        case "multipleOf" if _is(value, "number") and value % rule:
            yield expected(f"a multiple of {rule}")
        case "minLength" if isinstance(value, str) and len(value) < rule:
            yield expected(f"{rule} characters or more")
        case "required" if isinstance(value, dict):
            yield from (f"{below(key)}: missing" for key in rule if key not in value)
        case "properties" if isinstance(value, dict):
            for key in rule.keys() & value.keys():
                yield from _violations(value[key], rule[key], below(key), root)
        case "patternProperties" if isinstance(value, dict):
            for pattern, part in rule.items():
                for key in (key for key in value if re.search(pattern, key)):
                    yield from _violations(value[key], part, below(key), root)
        case "additionalProperties" if isinstance(value, dict):
            patterns = schema.get("patternProperties", ())
            for key in value.keys() - schema.get("properties", {}).keys():
                if not any(re.search(pattern, key) for pattern in patterns):
                    yield from _violations(value[key], rule, below(key), root)
        case "propertyNames" if isinstance(value, dict):
            for key in value:
                yield from _violations(key, rule, f"name {key!r}", root)
        case "minProperties" if isinstance(value, dict) and len(value) < rule:
            yield expected(f"{rule} members or more")
        case "items" if isinstance(value, list):
            for index, item in enumerate(value):
                yield from _violations(item, rule, f"{path}[{index}]", root)
        case "uniqueItems" if rule and isinstance(value, list):
            if any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
                yield expected("different items")
        case "allOf":
            for part in rule:
                yield from _violations(value, part, path, root)
        case "anyOf" if all(map(fails, rule)):
            yield expected(f"any of {len(rule)} forms")
        case "oneOf" if sum(map(fails, rule)) != len(rule) - 1:
            yield expected(f"one of {len(rule)} forms")
        case "if":
            branch = "else" if fails(rule) else "then"
            yield from _violations(value, schema.get(branch, True), path, root)
        case "not" if not fails(rule):
            yield expected(f"not {shortened(rule)}")
        case _ if keyword not in _KEYWORDS:
            raise ValueError(f"unknown keyword {keyword!r} in a schema of formats/")


_KEYWORDS = {
    "$ref", "type", "const", "enum", "minimum", "maximum", "multipleOf", "minLength", "required",
    "properties", "patternProperties", "additionalProperties", "propertyNames", "minProperties",
    "items", "uniqueItems",
    "allOf", "anyOf", "oneOf", "if", "then", "else", "not",
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
