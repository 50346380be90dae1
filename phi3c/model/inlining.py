"""Inline functions of TVMScript that are found in no time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tvm.script.parser.core.parser import Parser, ScriptMacro


def nearest_parser(self: ScriptMacro) -> Parser:
    """What ScriptMacro._find_parser_def returns: that of the caller nearest by which has one."""
    frame = sys._getframe(1)
    while frame is not None:
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError("an inline function was called outside of TVMScript")


@contextmanager
def quick_inlining() -> Iterator[None]:
    """Inside, TVMScript's parser looks for itself at the frames of the stack alone.

    TVM has `inspect` describe each of them, for every call of an inline function, by way of the
    source files of all modules that are loaded: three fourths of the time to make our kernels.
    """
    before = ScriptMacro._find_parser_def
    ScriptMacro._find_parser_def = nearest_parser
    try:
        yield
    finally:
        ScriptMacro._find_parser_def = before
