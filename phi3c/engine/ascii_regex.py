"""Expressions as Python's re reads them with re.ASCII, in the words of ECMAScript's, which xgrammar
reads. The two differ in `\\s`, which is Unicode's there, and in a `]` that comes first in a class,
which closes it there."""

from __future__ import annotations

import re

from phi3c.errors import InputError

__all__ = ["ascii_regex"]

_TOKEN = re.compile(r"\\.|.", re.DOTALL)
_SPACES = r" \t\n\r\f\v"
_OTHERS = r"\x00-\x08\x0e-\x1f!-\u{10ffff}"
_SETS = {r"\s", r"\S", r"\w", r"\W", r"\d", r"\D"}


def ascii_regex(expression: str) -> str:
    """Raises InputError for a range that ends in a set of characters, as `[a-\\s]`."""
    tokens, out = _TOKEN.findall(expression), []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token == "[":
            at = _class(tokens, at, out)
        else:
            out.append({r"\s": f"[{_SPACES}]", r"\S": f"[^{_SPACES}]"}.get(token, token))
    return "".join(out)


def _class(tokens: list[str], at: int, out: list[str]) -> int:
    """Writes the class whose items begin at `at`; where it ends."""
    out.append("[")
    if tokens[at : at + 1] == ["^"]:
        out.append("^")
        at += 1
    if tokens[at : at + 1] == ["]"]:
        out.append(r"\]")
        at += 1
    while at < len(tokens) and tokens[at] != "]":
        first, dash, last = (tokens[at : at + 3] + ["", ""])[:3]
        if dash == "-" and last not in ("", "]"):
            if _SETS & {first, last}:
                raise InputError(
                    f"regex: found the range {first}-{last}; accepted: from a character to another"
                )
            out.append(f"{first}-{last}")
            at += 3
        else:
            out.append({r"\s": _SPACES, r"\S": _OTHERS}.get(first, first))
            at += 1
    return at
