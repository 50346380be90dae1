"""xgrammar, given ascii_regex's words, lets through what Python's re does with re.ASCII."""

from __future__ import annotations

import re

import pytest
import xgrammar

from phi3c.engine.ascii_regex import ascii_regex
from phi3c.errors import InputError

ONE = [r"\s", r"\S", r"\w", r"\W", r"\d", r"\D", ".", r"[\s]", r"[^\s]", r"[\S]", r"[^\S]"]
ONE += [r"[\s\d-]", r"[-\s]", r"[a-c-\s]", r"[\S\n]", r"[^\S\n]", r"[]a]", r"[^]a]", r"[\]\s]"]
ONE += [r"\[|\s", r"(\s|\\)", r"[\\\s]", r"[\[\s]", r"[\x20-\x22\s]"]
CHARACTERS = [*map(chr, range(0x180)), *"\u1680\u2000\u200a\u200b\u2028\u202f\u3000\ufeff🙂"]


def lets_through(expression: str):
    info = xgrammar.TokenizerInfo(
        [bytes([i]) for i in range(256)] + [b""],
        xgrammar.VocabType.RAW,
        vocab_size=257,
        stop_token_ids=[256],
    )
    compiled = xgrammar.GrammarCompiler(info).compile_regex(ascii_regex(expression))

    def check(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.accept_token(256)

    return check


@pytest.mark.parametrize("expression", ONE)
def test_characters(expression):
    check, pattern = lets_through(expression), re.compile(expression, re.ASCII | re.DOTALL)
    for char in CHARACTERS:
        assert check(char) == (pattern.fullmatch(char) is not None), repr(char)


@pytest.mark.parametrize("text", ["", "a b", "a\u00a0b", "a]b", "a\t\nb", "a\\sb"])
@pytest.mark.parametrize("expression", [r"a\sb", r"a\s*b", r"a[]\s]b", r"a[\s]+b", r"a\\sb", ""])
def test_words(expression, text):
    expected = re.fullmatch(expression, text, re.ASCII | re.DOTALL) is not None
    assert lets_through(expression)(text) == expected


@pytest.mark.parametrize("expression", [r"[a-\s]", r"[\S-a]", r"x[^b\d-z]"])
def test_a_range_of_sets_is_refused(expression):
    with pytest.raises(re.error):
        re.compile(expression)
    with pytest.raises(InputError, match="regex: found the range .*; accepted: from a character"):
        ascii_regex(expression)


@pytest.mark.parametrize("expression", ["[", "[^", "[]", r"[\s", "[a-", "\\", "a[b-\\"])
def test_what_is_broken_stays_broken(expression):
    with pytest.raises(RuntimeError):
        xgrammar.Grammar.from_regex(ascii_regex(expression))
