"""A checkpoint's own tokenizer.

Text goes through the `tokenizers` library, as `tokenizer.json` describes it. Precedence among the
files is transformers': `tokenizer_config.json` may redefine added tokens,
`special_tokens_map.json` counts only where it does not. A chat becomes a prompt by the
checkpoint's own template (chat_template.py); where there is none, that is an error and not a
guess. Not here: tokenizers without a `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from phi3c.engine.chat_template import ChatTemplate, find_chat_template, one_line, read_text
from phi3c.engine.generation_config import generation_eos_token_ids, read_json_object
from phi3c.errors import CheckpointError, InputError

__all__ = ["Tokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


class Tokenizer:
    """Text to token ids and back, and chats to prompts. Build one with `from_folder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
        source: str = "tokenizer",
    ) -> None:
        """special_tokens: template variables such as bos_token; source: what errors name."""
        backend.no_truncation()  # a tokenizer.json may bring either; a prompt wants neither
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_template = None if chat_template is None else ChatTemplate(chat_template, source)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._source = source
        self._token_bytes: dict[int, bytes] = {}
        kinds = _decoder_kinds(backend)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the configuration files beside it."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        text = read_text(file)
        if text is None:
            raise CheckpointError(f"{file}: no such file; phi3c needs the fast tokenizer's file")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer: {one_line(error)}") from None

        config_file = folder / "tokenizer_config.json"
        config = read_json_object(config_file)
        if "added_tokens_decoder" in config:
            _add_tokens(backend, config["added_tokens_decoder"], config_file)
        else:
            config |= read_json_object(folder / "special_tokens_map.json")
        special = {
            name: token
            for name, value in config.items()
            if name.endswith("_token") and (token := _token_text(value)) is not None
        }
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
        _mark_special(backend, list(special.values()), [_token_text(v) for v in _values(extra)])

        eos = generation_eos_token_ids(folder)
        if not eos and "eos_token" in special:
            token_id = backend.token_to_id(special["eos_token"])
            if token_id is None:
                raise CheckpointError(
                    f"{config_file}: eos_token {special['eos_token']!r} is not in {file.name}"
                )
            eos = frozenset([token_id])
        return cls(
            backend,
            special_tokens=special,
            chat_template=find_chat_template(folder, config, config_file),
            eos_token_ids=eos,
            source=str(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones included; the model's vocabulary may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Where generation ends: generation_config.json's ids, or else the tokenizer's eos_token.

        The model's configuration may know more; empty where neither file names one.
        """
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognised."""
        if not isinstance(text, str):
            raise InputError(f"text: found {type(text).__name__}; accepted: a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: found a lone surrogate at {error.start}; accepted: Unicode text"
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids that the tokenizer does not know (padding of the model's vocabulary)
        have no text."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InputError(f"ids: {error}; accepted: a sequence of token ids") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text it does not begin; none if it is special.

        Several tokens may make up one character, so this need not be whole characters.
        """
        piece = self._token_bytes.get(token_id)
        if piece is None:
            piece = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return piece

    def first_token_bytes(self, token_id: int) -> bytes:
        """The same for the token that begins a text: decoders drop the space in front there."""
        piece = self.token_bytes(token_id)
        alone = self.decode([token_id])
        return piece if piece.decode(errors="replace") == alone else alone.encode()

    def _compute_token_bytes(self, token_id: int) -> bytes:
        # A token after itself has its full text. The text of a lone one may lack its first space.
        twice = self.decode([token_id, token_id])
        if not twice:
            return b""  # special, or unknown
        token = self._backend.id_to_token(token_id)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._byte_level:
            try:
                return bytes(_BYTE_LEVEL[char] for char in token)
            except KeyError:  # an added token, kept as plain text
                return token.encode()
        return twice[len(self.decode([token_id])) :].encode()

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt text for a chat: dicts with a `role` and, mostly, a `content`."""
        if self._chat_template is None:
            raise CheckpointError(
                f"{self._source}: no chat template in tokenizer_config.json or chat_template.jinja"
            )
        return self._chat_template.render(messages, add_generation_prompt, self._special_tokens)

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of the prompt for a chat; special tokens are the template's business alone."""
        text = self.apply_chat_template(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def _add_tokens(backend: tokenizers.Tokenizer, entries: Any, file: Path) -> None:
    """Apply tokenizer_config.json's added_tokens_decoder, whose flags beat tokenizer.json's."""
    try:
        contents = {int(token_id): entry["content"] for token_id, entry in entries.items()}
        tokens = [
            tokenizers.AddedToken(
                contents[token_id],
                **{flag: entry[flag] for flag in _TOKEN_FLAGS if flag in entry},
            )
            for token_id, entry in sorted((int(key), entry) for key, entry in entries.items())
        ]
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: added_tokens_decoder: {one_line(error)}") from None
    backend.add_tokens(tokens)
    for token_id, content in contents.items():
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{file}: added_tokens_decoder: {content!r} has id {token_id} here and "
                f"{backend.token_to_id(content)} in tokenizer.json"
            )


def _mark_special(backend: tokenizers.Tokenizer, named: list[str], extra: list[str | None]) -> None:
    """Named tokens (eos_token, ...) are special whatever their flags say; extra ones where they
    are not added tokens with flags of their own. Those outside the vocabulary stay unknown."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    names = [*named, *(name for name in extra if name is not None and name not in added)]
    backend.add_special_tokens(
        [
            added.get(name) or tokenizers.AddedToken(name, normalized=False)
            for name in names
            if backend.token_to_id(name) is not None
        ]
    )


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Types of the decoder's steps; the object's pickled state is their JSON."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: Latin-1's printable ones are themselves, the others
    are shifted to U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
