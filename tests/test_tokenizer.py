"""The tokenizer and chat template against transformers, and what it says about broken folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import CheckpointError, InputError

CORPUS = [
    "Hello world, how are you?",
    "  two  spaces\n\nand\tlines",
    "naïve café 你好 世界 🙂👍",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Lines and indentation, which trim_blocks and lstrip_blocks remove, and every helper.
HELPERS_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'skip' %}
        {%- continue %}
    {% endif %}
    {% generation %}{% set inner = 1 %}<|{{ message.role }}|>{% endgeneration %}{{ inner }}
    {{ message.content | trim }}{{ message.tool_calls | tojson if message.tool_calls }}
    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{{ {'b': '<é>', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}
{% if tools is none and documents is none %}no tools{% endif %}{{ pad_token }}
{{ strftime_now('%Y') }}
{% if add_generation_prompt %}
    <|assistant|>
{% endif %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": 'Be <brief> & "kind".'},
        {"role": "user", "content": "  naïve 你好?\n"},
        {"role": "assistant", "content": "🙂"},
        {"role": "user", "content": "<|end|> a </s> b"},
    ],
    [
        {"role": "skip", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f<", "args": {"é": 1.5}}]},
        {"role": "user", "content": "bye", "name": None},
    ],
]


def byte_level() -> tokenizers.Tokenizer:
    """As Phi-4 has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """As Phi-3 has it, here with a post-processor that puts <s> in front."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL[:3], limit_alphabet=45, show_progress=False
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
    backend.add_special_tokens(SPECIAL[:2])
    backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    backend.add_special_tokens([AddedToken(token, rstrip=True) for token in SPECIAL[3:]])
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
}
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|end|>",
    "pad_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "rstrip": False},
    "add_bos_token": False,
    "chat_template": PHI3_TEMPLATE,
}


@pytest.fixture(params=BACKENDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    BACKENDS[request.param]().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", CONFIG)
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


def oracle(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def assert_same(folder: Path, texts: list[str]) -> None:
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    assert ours.vocab_size == len(theirs)
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                decoded = ours.decode(ids, skip_special_tokens=skip)
                assert decoded == theirs.decode(ids, skip_special_tokens=skip)


TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces , and . punctuation !",
    "<s>Hello</s>  x<|end|>\n y <|user|>z",
    "naïve 你好 🤖\x00\ufffd",
]


def test_text_matches_transformers(folder: Path) -> None:
    assert_same(folder, TEXTS)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=10, max_size=10))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_matches_transformers(folder: Path, texts: list[str]) -> None:
    assert_same(folder, texts)


@pytest.mark.parametrize("template", [PHI3_TEMPLATE, HELPERS_TEMPLATE], ids=["phi3", "helpers"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_matches_transformers(folder: Path, template: str, prompt: bool) -> None:
    write(folder, "tokenizer_config.json", CONFIG | {"chat_template": template})
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    for chat in CHATS:
        before = json.dumps(chat)
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids
        assert json.dumps(chat) == before


def test_chat_prompt_has_no_second_bos(tmp_path: Path) -> None:
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{{ messages[0].content }}"
    write(tmp_path, "tokenizer_config.json", CONFIG | {"chat_template": template})
    tokenizer = Tokenizer.from_folder(tmp_path)
    bos = tokenizer.encode("")
    assert len(bos) == 1 and tokenizer.encode("Hello")[:1] == bos
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]).count(bos[0]) == 1


def test_where_templates_come_from(folder: Path) -> None:
    chat = CHATS[0]

    def rendered() -> str:
        text = Tokenizer.from_folder(folder).apply_chat_template(chat)
        assert text == oracle(folder).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        return text

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "list"}]
    write(folder, "tokenizer_config.json", CONFIG | {"chat_template": named})
    assert rendered() == "list"
    write(folder, "chat_template.jinja", "file {{ eos_token }}")
    assert rendered() == "file <|end|>"


def test_no_template_is_never_guessed(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("Hello")
    with one_line(CheckpointError, "no chat template"):
        tokenizer.apply_chat_template(CHATS[0])
    named = [{"name": "tool_use", "template": "x"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    with one_line(CheckpointError, "chat_template: .*'tool_use'.*'default'"):
        Tokenizer.from_folder(folder)


def one_line(error: type[ValueError], match: str) -> Any:
    """pytest.raises for a message without a line break."""
    return pytest.raises(error, match=rf"\A(?=[^\n]*\Z).*{match}")


@pytest.mark.parametrize(
    ("template", "error", "match"),
    [
        ("{{ raise_exception('Roles\nmust alternate') }}", InputError, "Roles must alternate"),
        ("{{ messages[7].content }}", InputError, "UndefinedError"),
        ("{{ messages[0].content + 1 }}", InputError, "TypeError"),
        ("{{ 1 / 0 }}", InputError, "ZeroDivisionError"),
        ("ok\n{% for %}", CheckpointError, "broken chat template: line 2"),
        ("{{ x | no_such_filter }}", CheckpointError, "no_such_filter"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", CheckpointError, "unsafe"),
        ("{{ messages.append(1) }}", CheckpointError, "unsafe"),
        ("{% include 'other' %}", InputError, "loader"),
    ],
)
def test_template_errors(folder: Path, template: str, error: type[ValueError], match: str) -> None:
    write(folder, "chat_template.jinja", template)
    tokenizer = Tokenizer.from_folder(folder)
    with one_line(error, match):
        tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        {"role": "user"},
        None,
        ["Hello"],
        [{"content": "no role"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": ...}],
        [{"role": "user", "content": b"bytes"}],
        [{"role": "user", "content": "\ud800"}],
    ],
    ids=repr,
)
def test_bad_messages(folder: Path, messages: Any) -> None:
    with one_line(InputError, "accepted"):
        Tokenizer.from_folder(folder).encode_chat(messages)


def test_eos_token_ids(folder: Path) -> None:
    def found() -> frozenset[int]:
        return Tokenizer.from_folder(folder).eos_token_ids

    end = Tokenizer.from_folder(folder).encode("<|end|>", add_special_tokens=False)[-1]
    assert found() == {end}
    write(folder, "generation_config.json", {"eos_token_id": [2, 5]})
    assert found() == {2, 5}
    write(folder, "generation_config.json", {"eos_token_id": 2})
    assert found() == {2}
    write(folder, "generation_config.json", {"do_sample": True})
    as_dict = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}
    write(folder, "tokenizer_config.json", {"eos_token": as_dict})
    assert found() == {2}
    write(folder, "tokenizer_config.json", {"eos_token": None})
    assert found() == frozenset()
    write(folder, "tokenizer_config.json", {"eos_token": "<nowhere>"})
    with one_line(CheckpointError, "eos_token '<nowhere>'"):
        found()


def test_special_tokens_map_is_the_older_place(folder: Path) -> None:
    """It counts while tokenizer_config.json has no added_tokens_decoder."""
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    write(folder, "tokenizer_config.json", {"eos_token": "<|end|>"})
    assert Tokenizer.from_folder(folder).eos_token_ids == {2}
    assert oracle(folder).eos_token_id == 2
    assert_same(folder, TEXTS)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token_ids == {2}

    end = Tokenizer.from_folder(folder).encode("<|end|>", add_special_tokens=False)[-1]
    config = {"eos_token": "<|end|>", "added_tokens_decoder": {str(end): {"content": "<|end|>"}}}
    write(folder, "tokenizer_config.json", config)
    assert Tokenizer.from_folder(folder).eos_token_ids == {end}
    assert oracle(folder).eos_token_id == end


def test_added_tokens_decoder_redefines_flags(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    size = tokenizer.vocab_size
    user = tokenizer.encode("<|user|>", add_special_tokens=False)[-1]
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        "2": {"content": "</s>", **flags, "special": True},
        str(user): {"content": "<|user|>", **flags, "special": False},
        str(size + 1): {"content": "<second>", **flags, "special": True},
        str(size): {"content": "<first>", **flags, "special": False},
    }
    config = {k: v for k, v in CONFIG.items() if k != "pad_token"}
    write(folder, "tokenizer_config.json", config | {"added_tokens_decoder": added})
    assert_same(folder, [*TEXTS, "a <first> b  <second> c"])

    write(
        folder,
        "tokenizer_config.json",
        {"added_tokens_decoder": {str(size + 3): {"content": "<x>", **flags}}},
    )
    with one_line(CheckpointError, f"'<x>' has id {size + 3} here and {size} in"):
        Tokenizer.from_folder(folder)
    for bad in ([], {"x": {"content": "y"}}, {"1": {}}, {"1": {"content": "<s>", "special": "n"}}):
        write(folder, "tokenizer_config.json", {"added_tokens_decoder": bad})
        with one_line(CheckpointError, "tokenizer_config.json: added_tokens_decoder"):
            Tokenizer.from_folder(folder)


def test_named_tokens_are_special(tmp_path: Path) -> None:
    """Phi-3's </s> is an ordinary added token, unless the configuration gives it a part."""
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).decode([2]) == "</s>"
    assert_same(tmp_path, TEXTS)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    assert Tokenizer.from_folder(tmp_path).decode([2]) == ""
    assert_same(tmp_path, TEXTS)
    word = Tokenizer.from_folder(tmp_path).encode("world", add_special_tokens=False)[-1]
    name = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).id_to_token(word)
    for config in (
        {"eos_token": name},
        {"image_token": name},
        {"additional_special_tokens": ["</s>", name]},
        {"extra_special_tokens": {"image_token": name}},
    ):
        write(tmp_path, "tokenizer_config.json", config)
        assert_same(tmp_path, TEXTS)


def test_truncation_and_padding_of_the_file_are_off(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = Tokenizer.from_folder(folder).encode("Hello world, how are you?")
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode("Hello world, how are you?") == plain


def test_ids_outside_the_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([*hello, tokenizer.vocab_size + 7]) == "Hello"
    assert tokenizer.decode(np.array(hello, dtype=np.int32)) == "Hello"
    assert tokenizer.token_bytes(np.int64(hello[-1])) == tokenizer.token_bytes(hello[-1])
    for bad in ([-1], [2**40], ["a"], [1.5], [None]):
        with one_line(InputError, "accepted"):
            tokenizer.decode(bad)
    for bad in (None, 5, b"x", "\ud800"):
        with one_line(InputError, "^text: found"):
            tokenizer.encode(bad)


BROKEN = ["", "{", "[]", "null", "[" * 100000, b"\xff"]


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in ("tokenizer.json", "tokenizer_config.json") for content in BROKEN]
    + [("tokenizer.json", '{"model": 1}'), ("tokenizer_config.json", '{"chat_template": 1}')],
    ids=lambda value: repr(value[:20]),
)
def test_broken_files_are_named(folder: Path, name: str, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(raw)
    with one_line(CheckpointError, name.replace(".", r"\.")):
        Tokenizer.from_folder(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, str(tmp_path / "nowhere")):
        with one_line(CheckpointError, r"tokenizer\.json: no such file"):
            Tokenizer.from_folder(path)
    (tmp_path / "tokenizer.json").mkdir()
    with one_line(CheckpointError, r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_bare_tokenizer_file_is_enough(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == frozenset()
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"
