"""What an answer must look like: a JSON schema, a regular expression, or one of several texts.

`Grammar` is what a request asks for and is plain data; grammar_compiler.py makes masks of it, with
xgrammar. Here are the limits that need no compiling: its size, and how deep it is nested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3c.errors import InputError

__all__ = ["Grammar", "GrammarLimits", "grammar_from_options"]

_KINDS = ("json_schema", "regex", "choice")


@dataclass(frozen=True)
class GrammarLimits:
    """What one grammar may take. Beyond any of them its request is refused."""

    text_bytes: int = 64 * 1024  # of the schema, the expression, all choices together
    depth: int = 64  # arrays and objects of a schema in each other, groups of an expression
    compile_seconds: float = 5.0  # of the wall clock, in a process of its own
    compile_bytes: int = 1 << 30  # of that process, above what it takes at rest
    compiled_bytes: int = 32 << 20  # of the result, in xgrammar's JSON
    token_seconds: float = 0.1  # of one thread's processor time, for one token's mask
    cached: int = 64  # compiled grammars kept, the last used ones,
    cached_bytes: int = 128 << 20  # and the memory that they take together


@dataclass(frozen=True)
class Grammar:
    """Make one with `json_schema`, `regex` or `choice`. Equal ones are compiled once.

    kind: "json_schema", "regex" or "choice"; texts: the schema as JSON, the expression, or the
    choices.
    """

    kind: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"grammar: found kind {self.kind!r}; accepted: {', '.join(_KINDS)}")
        if not isinstance(self.texts, tuple) or not self.texts:
            raise InputError(f"{self.kind}: found {self.texts!r}; accepted: at least one text")
        for text in self.texts:
            if not isinstance(text, str):
                raise InputError(f"{self.kind}: found {type(text).__name__}; accepted: a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{self.kind}: found a lone surrogate at {error.start}; accepted: Unicode text"
                ) from None

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON on one line, as json.dumps writes it, properties in the schema's order.

        schema: a dict, or its JSON text. Properties that it does not name are left out.
        """
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"json_schema: found {type(schema).__name__}: {error}; accepted: a JSON schema"
                ) from None
        return cls("json_schema", (schema,))

    @classmethod
    def regex(cls, expression: str) -> Grammar:
        """The whole answer matches. As Python's with re.ASCII and re.DOTALL: `.` is a new line too,
        and `\\w` is ASCII's. No look-around, back-references or flags."""
        return cls("regex", (expression,))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """The answer is one of these texts."""
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise InputError(f"choice: found {choices!r}; accepted: a list of texts")
        return cls("choice", tuple(choices))

    def check(self, limits: GrammarLimits) -> None:
        """Raises InputError if it is too large or too deep."""
        size = sum(len(text.encode()) for text in self.texts)
        if size > limits.text_bytes:
            raise InputError(
                f"{self.kind}: found {size} bytes; accepted: up to {limits.text_bytes}"
            )
        opening, closing = {"json_schema": ("[{", "]}"), "regex": ("(", ")")}.get(
            self.kind, ("", "")
        )
        found = _depth(self.texts[0], opening, closing)
        if found > limits.depth:
            raise InputError(
                f"{self.kind}: found a nesting {found} deep; accepted: up to {limits.depth}"
            )


def grammar_from_options(
    json_schema: str | Path | None = None,
    regex: str | None = None,
    choice: Sequence[str] = (),
) -> Grammar | None:
    """The grammar of a command line, None where it names none. InputError if it names several.

    json_schema: a file's path; choice: the values of an option that may be repeated.
    """
    given = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"found {' and '.join(names)}; accepted: one of them")
    if json_schema is not None:
        try:
            return Grammar.json_schema(Path(json_schema).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--json-schema: {json_schema}: cannot be read: {error}") from None
    if regex is not None:
        return Grammar.regex(regex)
    return Grammar.choice(list(choice)) if choice else None


def _depth(text: str, opening: str, closing: str) -> int:
    """The most brackets open at once; those in JSON's strings and escaped ones do not count."""
    depth = deepest = 0
    quoted = escaped = False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"' and "{" in opening:
            quoted = not quoted
        elif not quoted and char in opening:
            depth += 1
            deepest = max(deepest, depth)
        elif not quoted and char in closing:
            depth -= 1
    return deepest
