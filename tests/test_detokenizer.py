"""Incremental detokenization against decoding everything again after every token."""

from __future__ import annotations

import codecs
import json
import re
import time

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from phi3c.engine.detokenizer import IncrementalDetokenizer
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import InputError

CORPUS = [
    "Hello world, how are you?",
    "  two  spaces\n\nand\tlines",
    "naïve café 你好 世界 🙂👍",
] * 3
SPECIAL = ["<unk>", "<s>", "<|end|>"]
REPLACEMENT = "\ufffd"


def byte_level() -> Tokenizer:
    """As Phi-4 has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool call>", "été"])
    return Tokenizer(backend)


def sentencepiece(metaspace: bool = False) -> Tokenizer:
    """As Phi-3 has it: BPE over ▁-escaped text, unknown characters as byte tokens."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # tokens do not reach over a space
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL, limit_alphabet=45, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool call>", "été"])
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


TOKENIZERS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "metaspace": sentencepiece(metaspace=True),
}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)

TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\té你好世🙂👍aelow,.<>|▁"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Every piece of text in turn, the last one from finish."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text, character by character, up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def slow_certain(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The whole characters of `ids`, found by decoding them all, or fewer of them: byte fallback
    hides the whole characters before a half one. For ids that are the beginning of valid UTF-8."""
    text = tokenizer.decode(ids)
    if not text.endswith(REPLACEMENT):
        return text
    return max(text.rstrip(REPLACEMENT), slow_certain(tokenizer, ids[:-1]), key=len)


def slow_shown(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> str:
    """What may be shown after `ids`."""
    text = slow_certain(tokenizer, ids)
    cut = cut_at_stop(text, stop)
    if cut != text:
        return cut
    for start in range(len(text)):  # the longest end that may become a stop string
        if any(s.startswith(text[start:]) for s in stop):
            return text[:start]
    return text


def runs_are_whole(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """No broken UTF-8 in the bytes of `ids`."""
    try:
        b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()
    except UnicodeDecodeError:
        return False
    return True


@every_tokenizer
@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_whole(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)


@every_tokenizer
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_matches_slow_twin_after_every_token(kind: str, data: st.DataObject) -> None:
    """Stop strings come from the text itself, so that they cross token borders."""
    tokenizer = TOKENIZERS[kind]
    text = data.draw(TEXT.filter(lambda t: REPLACEMENT not in t))
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    inside = st.tuples(*[st.integers(0, len(decoded))] * 2).map(
        lambda ends: decoded[min(ends) : max(ends)]
    )
    short = st.text(" aél好🙂\n", min_size=1, max_size=3)
    stop = tuple(data.draw(st.lists(st.one_of(inside, short).filter(bool), max_size=3)))

    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    shown = ""
    for at, token_id in enumerate(ids):
        shown += detokenizer.add(token_id)
        assert shown == slow_shown(tokenizer, ids[: at + 1], stop)
        assert detokenizer.stopped == any(s in slow_certain(tokenizer, ids[: at + 1]) for s in stop)
    shown += detokenizer.finish()
    assert shown == cut_at_stop(decoded, stop)
    assert detokenizer.stopped == any(s in decoded for s in stop)
    assert detokenizer.finish() == ""


@every_tokenizer
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_any_ids_that_a_model_may_emit(kind: str, data: st.DataObject) -> None:
    """Halves of characters, stray bytes, special tokens and ids past the vocabulary."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=12))
    if kind != "byte_level":
        assume(runs_are_whole(tokenizer, ids))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_broken_byte_tokens_spoil_only_themselves(data: st.DataObject) -> None:
    """Where the library would turn the characters beside a broken byte into U+FFFD too."""
    tokenizer = TOKENIZERS["sentencepiece"]
    whole = st.sampled_from(["好", "🙂", "ß", "Hello", " "]).map(str.encode)
    broken = st.sampled_from([b"\xff", b"\x80", b"\xe4\xbd", b"\xf0\x9f"])
    parts = data.draw(st.lists(st.one_of(whole, broken), max_size=8))
    raw = b"a" + b"".join(parts)
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in raw]
    assert "".join(stream(tokenizer, ids)) == raw.decode(errors="replace")


@every_tokenizer
def test_nothing_of_half_a_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("a🤖b")
    pieces = stream(tokenizer, ids)
    assert len(ids) > 4
    assert set("".join(pieces)) == set("a🤖b")
    assert [piece for piece in pieces if piece] == list("a🤖b")
    unfinished = IncrementalDetokenizer(tokenizer)
    assert "".join(unfinished.add(token_id) for token_id in ids[:-2]) == "a"
    assert unfinished.finish() == REPLACEMENT


@every_tokenizer
def test_special_tokens_are_not_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.encode("<|end|>", add_special_tokens=False)[-1]
    hello, world = tokenizer.encode("Hello"), tokenizer.encode(" world")
    ids = [end, *hello, end, *world, end]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert "<|end|>" not in tokenizer.decode(ids)


@every_tokenizer
def test_stop_string_across_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("Hello world, how are you?")
    detokenizer = IncrementalDetokenizer(tokenizer, ["ld, h"])
    pieces = [detokenizer.add(token_id) for token_id in ids]
    assert "".join(pieces) == "Hello wor"
    assert detokenizer.stopped
    assert detokenizer.add(ids[0]) == "" == detokenizer.finish()
    # Not the whole of it: what was held back comes out.
    assert "".join(stream(tokenizer, ids[:3], ("world, how is",))) == tokenizer.decode(ids[:3])


def test_first_complete_stop_string_counts() -> None:
    """Whether the text comes in one token or in many."""
    tokenizer = TOKENIZERS["byte_level"]
    split = [tokenizer.encode(char)[0] for char in "xabcd"]
    joined = tokenizer.encode("xabcd")
    for ids in (split, joined):
        assert "".join(stream(tokenizer, ids, ("abc", "b"))) == "xa"
        assert "".join(stream(tokenizer, ids, ("b", "abc"))) == "xa"
        assert "".join(stream(tokenizer, ids, ("bc", "abc"))) == "x"
        assert "".join(stream(tokenizer, ids, ("d", "cde"))) == "xabc"


@pytest.mark.parametrize("stop", ["x", [""], [1], ("a", None)])
def test_bad_stop_strings(stop: object) -> None:
    with pytest.raises(InputError, match=r"^stop: found .*accepted"):
        IncrementalDetokenizer(TOKENIZERS["byte_level"], stop)


@every_tokenizer
@pytest.mark.parametrize("text", [" Hello\n", "🙂", "\x80"], ids=["words", "emoji", "bytes"])
def test_time_per_token_does_not_grow(kind: str, text: str) -> None:
    """Long output: the second half takes about as long as the first."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    if text == "\x80":  # broken UTF-8 without end
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80"]
    detokenizer = IncrementalDetokenizer(tokenizer, ("never said",))
    times = []
    for _ in range(2):
        start = time.thread_time()
        for _ in range(3000):
            for token_id in ids:
                detokenizer.add(token_id)
        times.append(time.thread_time() - start)
    assert times[1] < 5 * times[0] + 0.1


@every_tokenizer
def test_token_bytes_are_the_text(kind: str) -> None:
    """Every token after a plain one, against the library."""
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode("a")
    for token_id in range(tokenizer.vocab_size + 3):
        text = tokenizer.decode([*before, token_id])[1:]
        assert tokenizer.token_bytes(token_id).decode(errors="replace") == text
    whole = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= whole


def test_replacement_is_python_s() -> None:
    """The library and Python agree on how many U+FFFD a broken sequence is."""
    tokenizer = TOKENIZERS["byte_level"]
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    raw = b"\xe4\xbd\xe4\xff\xf0\x9f\x98A\xed\xa0\x80\xc0\x80"
    ids = [by_byte[bytes([byte])] for byte in raw]
    assert tokenizer.decode(ids) == codecs.decode(raw, "utf-8", "replace")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert re.search(REPLACEMENT, tokenizer.decode(ids))
