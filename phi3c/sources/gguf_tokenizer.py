"""The tokenizer in a GGUF file's metadata, as the files that Hugging Face has for the same model.

GGUF keeps tokens, scores or merges, and token types; what tokenizer.json says beyond that follows
from `tokenizer.ggml.model` and `tokenizer.ggml.pre`. It has no strip flags for added tokens: those
are the Phi family's own, known by the vocabulary. llama.cpp knows them by the model's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .gguf_container import Gguf

_SPECIAL_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # what llama.cpp takes where a key is absent
_NO_ID = 2**32 - 1  # how -1 looks in an unsigned key
_END_OF_TURN = ("<|end|>", "<|im_end|>", "<|endoftext|>")  # files need not name them as eos or eot

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre → how text is cut into words; None: GPT-2's way, which ByteLevel knows.
_WORDS = {"gpt-2": None, "dbrx": _CL100K, "gpt-4o": _O200K}
_WAY_OUT = "Lay the model's own tokenizer.json beside the file"


class GgufTokenizer:
    """What a file's metadata says of its tokenizer. Raises CheckpointError.

    tokens: the text of every id, in order; types: of each, as gguf.TokenType; both empty where
    the file brings no tokenizer. special: bos, eos, eot, eom, unk and pad → id or None.
    """

    def __init__(self, file: Gguf, vocab_size: int):
        """vocab_size: rows of the model's embedding, which every id has to fit."""
        self._file = file
        self._model = file.text("tokenizer.ggml.model", "none")
        self.tokens = [] if self._model == "none" else file.texts("tokenizer.ggml.tokens")
        types = self._per_token("tokenizer.ggml.token_type") if self.tokens else None
        self.types = types or [_NORMAL] * len(self.tokens)
        if len(self.tokens) > vocab_size:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.tokens: found {len(self.tokens)} tokens; accepted: "
                f"up to {vocab_size}, the rows of token_embd.weight"
            )
        self.special = {name: self._special_id(name, vocab_size) for name in _SPECIAL_IDS}

    def end_ids(self) -> list[int]:
        """Where a turn of a chat or a text ends."""
        named = [self.special[name] for name in ("eos", "eot", "eom")]
        known = [i for i, token in enumerate(self.tokens) if token in _END_OF_TURN]
        return sorted({i for i in [*named, *known] if i is not None})

    def config_json(self) -> bytes:
        """tokenizer_config.json."""
        config: dict[str, Any] = {
            "add_bos_token": self._adds_bos,
            "add_eos_token": self._adds_eos,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        for name in ("bos", "eos", "unk", "pad"):
            config[f"{name}_token"] = self._text(name)
        template = self._file.text("tokenizer.chat_template", None)
        if template is not None:
            config["chat_template"] = template
        return json.dumps(config, indent=2, ensure_ascii=False).encode()

    def tokenizer_json(self) -> bytes | None:
        """tokenizer.json; None where the file brings no tokenizer."""
        if not self.tokens:
            return None
        try:
            tokenizer = self._build()
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.*: not a tokenizer: {reason}. {_WAY_OUT}"
            ) from None
        return tokenizer.to_str().encode()

    def check_same_tokens(self, vocabulary: dict[str, int], source: str) -> None:
        """Refuses another model's vocabulary. source: what errors name."""
        for token, i in vocabulary.items():
            if i >= len(self.tokens) or self.types[i] != _NORMAL:
                continue  # added tokens are the user's to rename
            if self.tokens[i] != token:
                raise CheckpointError(
                    f"{source}: token {i}: found {token!r}; accepted: {self.tokens[i]!r}, as "
                    f"{self._file.path} has it: this is another model's tokenizer"
                )

    def _build(self) -> Tokenizer:
        vocabulary = self._vocabulary()
        if self._model == "llama":
            tokenizer = self._sentencepiece(vocabulary)
        elif self._model == "gpt2":
            tokenizer = self._byte_level(vocabulary)
        else:
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.model: found {self._model!r}; accepted: llama, "
                f"gpt2. {_WAY_OUT}"
            )
        tokenizer.add_tokens(list(self._added_tokens()))
        before = [self._added_text("bos")] if self._adds_bos else []
        after = [self._added_text("eos")] if self._adds_eos else []
        if before or after:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                special_tokens=[(token, vocabulary[token]) for token in {*before, *after}],
            )
        return tokenizer

    def _sentencepiece(self, vocabulary: dict[str, int]) -> Tokenizer:
        """As transformers converts a Llama tokenizer.model."""
        scores = self._per_token("tokenizer.ggml.scores")
        if scores is None:
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.scores: found nothing; accepted: a score for "
                f"each token (required). {_WAY_OUT}"
            )
        pieces = {t: scores[i] for t, i in vocabulary.items() if self.types[i] == _NORMAL}
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                list(merges_of_scores(vocabulary, pieces)),
                unk_token=self._text("unk"),
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = self._file.flag("tokenizer.ggml.add_space_prefix", True)
        spaces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if prefix else steps
        )
        return tokenizer

    def _byte_level(self, vocabulary: dict[str, int]) -> Tokenizer:
        """As GPT-2's tokenizer.json, with the pre-tokenizer that the file names."""
        pre = self._file.text("tokenizer.ggml.pre", "default")
        if pre not in _WORDS:
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.pre: found {pre!r}; accepted: "
                f"{', '.join(_WORDS)}. {_WAY_OUT}"
            )
        lines = self._file.texts("tokenizer.ggml.merges")
        merges = [tuple(line.split(" ", 1)) for line in lines]
        if broken := [line for line, pair in zip(lines, merges, strict=True) if len(pair) < 2]:
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.merges: found {broken[0]!r}; accepted: two "
                f"tokens with a space between. {_WAY_OUT}"
            )
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        pattern = _WORDS[pre]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        tokenizer.pre_tokenizer = byte_level
        if pattern is not None:
            words = pre_tokenizers.Split(Regex(pattern), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _vocabulary(self) -> dict[str, int]:
        """Token → id, without what only fills the embedding up."""
        vocabulary: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if self.types[i] == _UNUSED and token == f"[PAD{i}]":
                continue
            if token in vocabulary:
                raise CheckpointError(
                    f"{self._file.path}: tokenizer.ggml.tokens: found {token!r} as token "
                    f"{vocabulary[token]} and as token {i}"
                )
            vocabulary[token] = i
        return vocabulary

    def _added_tokens(self) -> Iterator[AddedToken]:
        """In order of their ids."""
        strip = self._strip_rule()
        for token, kind in zip(self.tokens, self.types, strict=True):
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
                left, right = strip(token)
                yield AddedToken(
                    token,
                    lstrip=left,
                    rstrip=right,
                    normalized=False,
                    special=kind != _USER_DEFINED,
                )

    def _strip_rule(self):
        """Token → whether it takes the white space on its left, on its right.

        Phi-3 and Phi-4-mini let markers take what follows (so no newline after <|user|> reaches
        the model), Phi-4 what is on both sides.
        """
        pre = self._file.text("tokenizer.ggml.pre", "default")
        if self._model == "llama" and "<|end|>" in self.tokens:
            return lambda t: (False, t == "</s>" or _is_marker(t) and t != "<|endoftext|>")
        if self._model == "gpt2" and pre == "gpt-4o" and "<|end|>" in self.tokens:
            kept = ("<|endoftext|>", "<|endofprompt|>")
            return lambda t: (False, _is_marker(t) and t not in kept)
        if self._model == "gpt2" and pre == "dbrx" and "<|im_sep|>" in self.tokens:
            return lambda t: (_is_marker(t), _is_marker(t))
        return lambda t: (False, False)

    @property
    def _adds_bos(self) -> bool:
        return self._file.flag("tokenizer.ggml.add_bos_token", self._model == "llama")

    @property
    def _adds_eos(self) -> bool:
        return self._file.flag("tokenizer.ggml.add_eos_token", False)

    def _added_text(self, name: str) -> str:
        text = self._text(name)
        if text is None:
            raise CheckpointError(
                f"{self._file.path}: tokenizer.ggml.add_{name}_token: found true without "
                f"{_SPECIAL_IDS[name]}; accepted: both"
            )
        return text

    def _text(self, name: str) -> str | None:
        i = self.special[name]
        return self.tokens[i] if i is not None and i < len(self.tokens) else None

    def _special_id(self, name: str, vocab_size: int) -> int | None:
        key = _SPECIAL_IDS[name]
        default = _SENTENCEPIECE_IDS.get(name) if self._model == "llama" else None
        i = self._file.integer(key, default)
        if i in (None, -1, _NO_ID):
            return None
        if not 0 <= i < vocab_size:
            raise CheckpointError(
                f"{self._file.path}: {key}: found {i}; accepted: 0 to {vocab_size - 1}, the rows "
                "of token_embd.weight"
            )
        return i

    def _per_token(self, key: str) -> list | None:
        values = self._file.numbers(key, None)
        if values is not None and len(values) != len(self.tokens):
            raise CheckpointError(
                f"{self._file.path}: {key}: found {len(values)} values; accepted: one for each "
                f"of the {len(self.tokens)} tokens"
            )
        return values


def merges_of_scores(
    vocabulary: dict[str, int], pieces: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """The merges that SentencePiece's scores imply, best first, in transformers' order.

    Every way to put a piece together from two others is one. pieces: score of each token that
    text can become (not control, byte or added tokens).
    """
    for piece in sorted(pieces, key=lambda piece: -pieces[piece]):
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        pairs = [(left, right) for left, right in halves if left in pieces and right in pieces]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _is_marker(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")
