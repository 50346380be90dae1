"""Text while it is generated: token ids in, only text that is certain out.

Each token contributes bytes (`Tokenizer.token_bytes`) to a UTF-8 stream, which is decoded as it
arrives. The cost per token does not depend on how much came before, and text is the same as that
of decoding all ids at once, with one exception: where a tokenizer has byte fallback, the
`tokenizers` library turns a whole run of byte tokens into U+FFFD when one byte of it is broken.
That would take back characters that were shown already, so here only the broken bytes become
U+FFFD.

A stop string ends the text before its first character. If several are in the text, the one that is
complete first counts, and the longest of those that end at the same character; where tokens begin
and end makes no difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import InputError

__all__ = ["IncrementalDetokenizer"]


class IncrementalDetokenizer:
    """The visible text of one sequence. Special tokens are left out of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop: found {stop!r}; accepted: a sequence of non-empty strings")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True
        self._held = ""  # the beginning of a stop string, perhaps

    def add(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, often empty."""
        if self.stopped:
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if piece and self._at_start:
            piece = self._tokenizer.first_token_bytes(token_id)
            self._at_start = False
        return self._release(self._utf8.decode(piece))

    def finish(self) -> str:
        """No more tokens will come: return what was held back."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        """Append `new` to what is held; return what cannot be part of a stop string."""
        if not new:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
