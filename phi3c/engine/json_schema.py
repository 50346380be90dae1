"""Which JSON schemas xgrammar follows to the letter.

It passes over keywords that it does not know how to enforce, without a word. An answer that breaks
its schema is worse than a refusal, so those are refused here by name. What it warns about (oneOf of
branches that overlap, pattern beside maxLength) is refused when it is compiled.
"""

from __future__ import annotations

import json
from typing import Any

from phi3c.errors import InputError

__all__ = ["check_json_schema"]

_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties"}
    | {"propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
# Each is the whole of a schema: xgrammar looks at nothing beside it.
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_NOT_ENFORCED = {"not", "if", "then", "else", "uniqueItems", "contains", "minContains"} | {
    "maxContains",
    "additionalItems",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "multipleOf",
    "$dynamicRef",
    "$recursiveRef",
}
_ASSERTIONS = set.union(*_OF_TYPE.values()) | {"type", *_ALONE}
# Keywords whose value is a schema, a list of them, or a dict of them.
_SCHEMA = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties") + (
    "unevaluatedItems",
)
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def check_json_schema(text: str) -> None:
    """Raises InputError for what is no JSON schema, and for what would not be enforced."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"json_schema: found no JSON ({error}); accepted: a schema") from None
    _check(schema, "#")


def _check(schema: Any, place: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _refusal(place, type(schema).__name__, "an object, true or false")
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not all(isinstance(t, str) and t in _OF_TYPE for t in types):
        raise _refusal(f"{place}/type", repr(schema["type"]), ", ".join(_OF_TYPE))
    accepted = set().union(*(_OF_TYPE[name] for name in types))
    alone = [name for name in _ALONE if name in schema]
    for name, value in schema.items():
        if name in _NOT_ENFORCED - accepted and not (name == "uniqueItems" and value is False):
            raise _refusal(place, f"{name}, which cannot be enforced", "schemas without it here")
        if name in _ASSERTIONS and alone and name != alone[0] and not _fits(name, schema, types):
            raise _refusal(place, f"{name} beside {alone[0]}", "one of them")
        if name in _ASSERTIONS - {"type", *_ALONE} - accepted:
            raise _refusal(place, f"{name} without its type", "type beside it")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not (
        reference == "#" or reference.startswith(tuple(f"#/{name}/" for name in _NAMED))
    ):
        raise _refusal(f"{place}/$ref", repr(reference), "#, or #/$defs/ and a name")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise _refusal(f"{place}/allOf", f"{len(schema['allOf'])} schemas", "one")
    for name in _SCHEMA:
        if name in schema:
            _check(schema[name], f"{place}/{name}")
    for name in _SCHEMAS:
        if name in schema:
            if not isinstance(schema[name], list):
                raise _refusal(f"{place}/{name}", type(schema[name]).__name__, "a list of schemas")
            for at, inner in enumerate(schema[name]):
                _check(inner, f"{place}/{name}/{at}")
    for name in _NAMED:
        if name in schema:
            if not isinstance(schema[name], dict):
                raise _refusal(f"{place}/{name}", type(schema[name]).__name__, "named schemas")
            for key, inner in schema[name].items():
                _check(inner, f"{place}/{name}/{key}")


def _fits(name: str, schema: dict[str, Any], types: list[str]) -> bool:
    """Whether it is a type beside const or enum, and says nothing that their values do not."""
    if name != "type" or not ("enum" in schema) ^ ("const" in schema):
        return False
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    return isinstance(values, list) and all(_kinds(value) & set(types) for value in values)


def _kinds(value: Any) -> set[str]:
    """JSON's types of a value."""
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return {"number", "integer"} if whole else {"number"}
    return {{str: "string", list: "array", dict: "object"}[type(value)]}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refusal(place: str, found: str, accepted: str) -> InputError:
    place = "".join(char if char.isprintable() else "?" for char in place)
    return InputError(f"json_schema: {place}: found {found}; accepted: {accepted}")
