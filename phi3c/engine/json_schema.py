"""Which JSON schemas xgrammar follows to the letter.

It passes over keywords that it does not know how to enforce, without a word. An answer that breaks
its schema is worse than a refusal, so those are refused here by name. What it warns about (oneOf of
branches that overlap) is refused when it is compiled. Where it lets through what is no JSON, the
schema is said in other words: bounds of a string's length let in control characters (xgrammar
0.2.8), the same bounds in a pattern do not, and so it is with some formats.
"""

from __future__ import annotations

import json
import re
from typing import Any

from phi3c.errors import InputError

__all__ = ["enforceable_schema"]

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
_OF_PROPERTIES = ("properties", "additionalProperties", "unevaluatedProperties") + (
    "propertyNames",
    "patternProperties",
)
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


# One character of a string, as JSON writes it without an escape.
_CHARACTER = r'[^\u0000-\u001f"\\]'
_POINTER = r"(/([ !#-.0-\[\]-}]|~[01])*)*"
_FORMATS = {
    "email": r"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
}
# Patterns that xgrammar turns into patterns of JSON: ASCII, without what JSON escapes. Others are
# taken for JSON as they are, so they may name single characters only.
_PATTERN = re.compile(
    r"""([ !#-\[\]-~]|\\[dwsDWS^$.*+?()\[\]{}|/-])*|(?![^\0]*\[\^)[^\0-\x1f"\\.]*"""
)


def enforceable_schema(text: str) -> str:
    """The schema as JSON, in words that xgrammar follows.

    Raises InputError for what is no JSON schema, and for what would not be enforced.
    """
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"json_schema: found no JSON ({error}); accepted: a schema") from None
    return json.dumps(_enforceable(schema, "#"))


def _enforceable(schema: Any, place: str) -> Any:
    if isinstance(schema, bool):
        return schema
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
    _check_object(schema, place)
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not (
        reference == "#" or reference.startswith(tuple(f"#/{name}/" for name in _NAMED))
    ):
        raise _refusal(f"{place}/$ref", repr(reference), "#, or #/$defs/ and a name")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise _refusal(f"{place}/allOf", f"{len(schema['allOf'])} schemas", "one")
    return _strings(schema, place) | _inner(schema, place)


def _check_object(schema: dict[str, Any], place: str) -> None:
    """What xgrammar enforces of an object's keywords only where others are not beside them."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(required, list):
        raise _refusal(f"{place}/required", type(required).__name__, "a list of names")
    if isinstance(properties, dict) and (more := [n for n in required if n not in properties]):
        raise _refusal(f"{place}/required", repr(more[0]), "names in properties")
    for name in ("propertyNames", "patternProperties"):
        beside = [each for each in _OF_PROPERTIES if each in schema and each != name]
        if name in schema and beside:
            raise _refusal(place, f"{beside[0]} beside {name}", "one of them")
    # A name may come twice where any may come, and counts twice.
    more = [schema[name] for name in _OF_PROPERTIES[1:] if name in schema]
    if schema.get("minProperties", 0) not in (0, 1) and (not properties or any(more)):
        raise _refusal(f"{place}/minProperties", "names that are open", "properties alone, or 0, 1")


def _inner(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The keywords that hold schemas."""
    found: dict[str, Any] = {}
    for name, value in schema.items():
        at = f"{place}/{name}"
        if name in _SCHEMA:
            found[name] = _enforceable(value, at)
        elif name in _SCHEMAS:
            if not isinstance(value, list):
                raise _refusal(at, type(value).__name__, "a list of schemas")
            found[name] = [_enforceable(inner, f"{at}/{i}") for i, inner in enumerate(value)]
        elif name in _NAMED:
            if not isinstance(value, dict):
                raise _refusal(at, type(value).__name__, "named schemas")
            found[name] = {key: _enforceable(inner, f"{at}/{key}") for key, inner in value.items()}
            if name == "patternProperties":
                for pattern in value:
                    _check_pattern(pattern, at)
    return found


def _strings(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """Lengths, and some formats, as patterns."""
    if "pattern" in schema:
        _check_pattern(schema["pattern"], f"{place}/pattern")
    bounds = [name for name in ("minLength", "maxLength") if name in schema]
    ways = [name for name in ("pattern", "format") if name in schema] + bounds[:1]
    if len(ways) > 1:
        raise _refusal(place, f"{ways[1]} beside {ways[0]}", "one of them")
    if not bounds:
        return _with_own_format(schema)
    for name in bounds:
        if type(schema[name]) is not int or schema[name] < 0:
            raise _refusal(f"{place}/{name}", repr(schema[name]), "an integer of 0 or more")
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if most != "" and least > most:
        raise _refusal(f"{place}/maxLength", str(most), f"minLength ({least}) or more")
    rest = {name: value for name, value in schema.items() if name not in bounds}
    return rest | {"pattern": f"^{_CHARACTER}{{{least},{most}}}$"}


def _with_own_format(schema: dict[str, Any]) -> dict[str, Any]:
    pattern = _FORMATS.get(str(schema.get("format")))
    if pattern is None:
        return schema
    return {name: value for name, value in schema.items() if name != "format"} | {
        "pattern": pattern
    }


def _check_pattern(pattern: Any, place: str) -> None:
    if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
        raise _refusal(
            place,
            repr(pattern)[:60],
            "printable ASCII without quotes and escapes of characters, or plain letters",
        )


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
