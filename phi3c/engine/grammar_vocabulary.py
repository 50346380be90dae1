"""A tokenizer's tokens as bytes, and which of them would break UTF-8.

xgrammar's classes of characters let in byte sequences that only look like UTF-8 (overlong ones,
surrogates, beyond U+10FFFF), which tokens of single bytes can spell. They are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

__all__ = ["GrammarVocabulary"]

_NEVER = re.compile(
    rb"[\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]"
)
_LEADS = (0xE0, 0xED, 0xF0, 0xF4)  # after which not every continuation byte is right


class GrammarVocabulary:
    """pieces: what each id adds to a text, nothing for ids that are not text (special tokens,
    padding). first: the same for tokens that add something else to a text that they begin."""

    def __init__(self, pieces: Sequence[bytes], first: dict[int, bytes]) -> None:
        self.pieces = pieces
        self.first = first
        never = np.array([bool(_NEVER.search(piece)) for piece in pieces])
        # By the last byte of the text so far, `[vocab]` bool; 0 stands for all others.
        self._broken = {0: never}
        for lead in _LEADS:
            wrong = [bool(_NEVER.match(bytes([lead]) + piece)) for piece in pieces]
            self._broken[lead] = never | np.array(wrong)

    @property
    def size(self) -> int:
        return len(self.pieces)

    def broken_after(self, byte: int) -> np.ndarray:
        """Tokens that cannot come after a text's last byte, `[vocab]` bool."""
        return self._broken.get(byte, self._broken[0])
