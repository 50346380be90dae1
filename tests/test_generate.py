"""Sessions and generation against transformers' generate(), LongRoPE's switch above all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import longrope
from tokenizers import decoders, models, pre_tokenizers, trainers

import phi3c
from phi3c.engine.generate import Generation
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.session import Session
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import ContextLengthError, InputError

ORIGINAL_MAX, CONTEXT, CHUNK, VOCAB = 32, 120, 16, 320
MODEL = dict(
    vocab_size=VOCAB,
    max_position_embeddings=256,
    original_max_position_embeddings=ORIGINAL_MAX,
    rope_scaling=longrope(16),
)
SMALL = dict(prefill_chunk_size=CHUNK, context_length=CONTEXT, max_batch_size=2)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GREEDY = dict(temperature=0.0, ignore_eos=True)


def write_tokenizer(
    folder: Path, eos: int | list[int] = 2, template: str | None = TEMPLATE
) -> None:
    """A byte-level tokenizer of 300 of the model's 320 ids, and what lies beside it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = "the cat sat on the mat and the dog ran to the man; hello world, how are you today? "
    backend.train_from_iterator([corpus, corpus.upper(), corpus.title()] * 2, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


@pytest.fixture(scope="module")
def model(build_model):
    return on_one_thread(build_model("generate", compile_options=SMALL, **MODEL))


def on_one_thread(model):
    """TVM's pool is slow, and these models tiny, where other programs use the cores."""
    return replace(model, compiled=phi3c.load(model.compiled.artifact.path, threads=1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def session(model):
    return Session(model.compiled)


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(7, VOCAB, n).tolist()


def finished(*args, **params) -> Generation:
    generation = Generation(*args, SamplingParams(**params))
    pieces = list(generation)
    assert "".join(pieces) == generation.text and all(pieces)
    return generation


def oracle_tokens(model, prompt: list[int], n: int, eos: int | None = None) -> list[int]:
    model.oracle.generation_config.eos_token_id = eos
    out = model.oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


# Sessions


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, ORIGINAL_MAX, ORIGINAL_MAX + 1, CONTEXT])
def test_extend_in_chunks(model, session, length):
    ids = random_ids(length)
    model.check(session.extend(ids), model.last_logits(ids))
    assert session.tokens == ids and session.computed_tokens == length


def test_extend_token_by_token_recomputes_once(model, session):
    ids = random_ids(ORIGINAL_MAX + 8)
    short, long = model.logits(ids[:ORIGINAL_MAX]), model.logits(ids)
    session.extend(ids[:20])
    for n in range(21, len(ids) + 1):
        logits = session.extend(ids[n - 1 : n])
        assert logits.shape == (VOCAB,) and logits.dtype == np.float32
        model.check(logits, (short if n <= ORIGINAL_MAX else long)[n - 1])
    assert session.computed_tokens == len(ids) + ORIGINAL_MAX


@pytest.mark.parametrize(
    "start, length",
    [(20, n) for n in (0, 1, 10, 19, 20)] + [(60, n) for n in (0, 1, 10, 32, 33, 45, 60)],
)
def test_rewind_then_extend(model, session, start, length):
    """Back within the short factors, within the long ones, and across the switch."""
    ids, more = random_ids(start), random_ids(3, seed=1)
    session.extend(ids)
    session.rewind(length)
    assert session.tokens == ids[:length]
    expected = ids[:length] + more
    model.check(session.extend(more), model.last_logits(expected))
    assert session.tokens == expected


@pytest.mark.parametrize("before", [0, 10, 31, 50])
@pytest.mark.parametrize("shared", [0, 9, 30, 45])
@pytest.mark.parametrize("after", [1, 20, 40])
def test_resume_is_a_fresh_session(model, session, before, shared, after):
    common = random_ids(shared)
    if before:
        session.extend(common + random_ids(before, seed=1))
    ids = common + random_ids(after, seed=2)
    logits = session.resume(ids)
    fresh = Session(model.compiled).extend(ids)
    assert np.abs(logits - fresh).max() <= 1e-5 * np.abs(fresh).max()
    assert session.tokens == ids


def test_resume_reuses_what_is_shared(session):
    ids = random_ids(70)
    first = session.resume(ids[:60])
    assert session.computed_tokens == 60
    session.resume(ids)
    assert session.computed_tokens == 70
    again = session.resume(ids[:60])  # all of it is there; the last token gives the logits
    assert session.computed_tokens == 71
    assert np.abs(again - first).max() <= 1e-5 * np.abs(first).max()


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1], [1.5], ["a"], [True], [2**40]])
def test_bad_tokens(session, ids):
    session.extend([7, 8])
    for call in (session.extend, session.resume):
        with pytest.raises(InputError, match="tokens"):
            call(ids)
    assert session.tokens == [7, 8] and session.computed_tokens == 2


def test_too_many_tokens_change_nothing(model, session):
    ids = random_ids(CONTEXT)
    session.extend(ids[:-1])
    for call, n in ((session.extend, 2), (session.resume, CONTEXT + 1)):
        with pytest.raises(ContextLengthError, match=f"found {n}.* up to {CONTEXT}"):
            call(random_ids(n))
    assert session.tokens == ids[:-1]
    model.check(session.extend(ids[-1:]), model.last_logits(ids))
    for length in (-1, CONTEXT + 1):
        with pytest.raises(InputError, match=f"length: found {length}"):
            session.rewind(length)


@pytest.mark.parametrize("after_chunks", [0, 1, 3])
def test_an_interrupted_call_leaves_a_usable_session(model, session, monkeypatch, after_chunks):
    ids, embed = random_ids(60), session.model.embed
    calls = []

    def interrupted(chunk):
        calls.append(chunk)
        if len(calls) > after_chunks:
            raise KeyboardInterrupt
        return embed(chunk)

    session.extend(ids[:10])
    monkeypatch.setattr(session.model, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.extend(ids[10:])
    monkeypatch.undo()
    assert session.tokens == ids[: CHUNK * after_chunks]  # long factors now: begun anew
    model.check(session.resume(ids), model.last_logits(ids))
    session.rewind(20)
    model.check(session.extend(ids[20:25]), model.last_logits(ids[:25]))


def test_sliding_window(build_model):
    """Pages that leave the window are freed, so that going back far means to recompute."""
    window = dict(vocab_size=VOCAB, sliding_window=24)
    model = on_one_thread(build_model("generate-window", compile_options=SMALL, **window))
    session, ids = Session(model.compiled), random_ids(CONTEXT)
    expected = model.logits(ids)
    model.check(session.extend(ids[:70]), expected[69])
    for n in range(71, CONTEXT + 1):
        model.check(session.extend(ids[n - 1 : n]), expected[n - 1])
    computed = session.computed_tokens
    session.rewind(CONTEXT - 5)
    model.check(session.extend(ids[-5:-3]), expected[-4])
    assert session.computed_tokens == computed + 2
    session.rewind(40)
    assert session.computed_tokens == computed + 42 and session.tokens == ids[:40]
    model.check(session.resume(ids[:20] + ids[:9]), model.last_logits(ids[:20] + ids[:9]))


# Generation


@pytest.mark.parametrize("prompt", [1, 24, ORIGINAL_MAX - 1, ORIGINAL_MAX, ORIGINAL_MAX + 1, 50])
def test_greedy_is_transformers_generate(model, tokenizer, session, prompt):
    ids = random_ids(prompt, seed=prompt)
    n = 80 - prompt if prompt == 24 else 12
    generation = finished(session, tokenizer, ids, **GREEDY, max_tokens=n)
    assert generation.token_ids == oracle_tokens(model, ids, n)
    assert generation.finish_reason == "length"
    assert generation.text == tokenizer.decode(generation.token_ids)
    assert generation.prefill_tokens == prompt
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0


def test_nothing_runs_before_the_iteration(tokenizer, session):
    generation = Generation(session, tokenizer, random_ids(5), SamplingParams(**GREEDY))
    assert session.computed_tokens == 0 and generation.finish_reason is None
    next(iter(generation))
    assert generation.finish_reason is None and generation.token_ids


def test_end_of_sequence(model, tokenizer, session, tmp_path):
    ids = random_ids(24)
    tokens = finished(session, tokenizer, ids, **GREEDY, max_tokens=40).token_ids
    end = next(i for i in range(5, 40) if tokens[i] not in tokens[:i])
    write_tokenizer(tmp_path, eos=[2, tokens[end]])
    ending = Tokenizer.from_folder(tmp_path)
    generation = finished(session, ending, ids, temperature=0.0, max_tokens=40)
    assert generation.token_ids == tokens[: end + 1]
    assert generation.token_ids == oracle_tokens(model, ids, 40, eos=tokens[end])
    assert generation.finish_reason == "stop"
    # The last token that max_tokens allows may be the end too.
    last = finished(session, ending, ids, temperature=0.0, max_tokens=end + 1)
    assert last.finish_reason == "stop"
    ignoring = finished(session, ending, ids, **GREEDY, max_tokens=40)
    assert ignoring.token_ids == tokens and ignoring.finish_reason == "length"


def test_config_ends_too(model, tokenizer, session, monkeypatch):
    """The model's config names eos 2; here the tokenizer's files name none."""
    monkeypatch.setattr(tokenizer, "_eos_token_ids", frozenset())
    row = np.zeros(VOCAB, np.float32)
    row[2] = 9
    monkeypatch.setattr(session, "extend", lambda ids: row)
    generation = finished(session, tokenizer, [9, 10, 11], temperature=0.0)
    assert generation.token_ids[-1] == 2 and generation.finish_reason == "stop"


def test_stop_strings(tokenizer, session):
    ids = random_ids(24)
    whole = finished(session, tokenizer, ids, **GREEDY, max_tokens=60)
    stop = whole.text[11:15]
    stopped = finished(session, tokenizer, ids, **GREEDY, max_tokens=60, stop=("never there", stop))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(whole.token_ids)
    # What could begin a stop string is given back at the end.
    held = finished(session, tokenizer, ids, **GREEDY, max_tokens=60, stop=(whole.text[-3:] + "!",))
    assert held.text == whole.text and held.finish_reason == "length"


def test_seeds(tokenizer, session):
    ids = random_ids(24)

    def sample(seed):
        return finished(session, tokenizer, ids, seed=seed, max_tokens=30).token_ids

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


@pytest.mark.parametrize("prompt", [24, CONTEXT - 1])
@pytest.mark.parametrize("max_tokens", [None, 10**9])
def test_until_the_context_is_full(tokenizer, session, prompt, max_tokens):
    generation = finished(session, tokenizer, random_ids(prompt), **GREEDY, max_tokens=max_tokens)
    assert len(generation.token_ids) == CONTEXT - prompt
    assert generation.finish_reason == "length"


@pytest.mark.parametrize(
    "prompt, error, message",
    [
        ([], InputError, "found none"),
        ([5, VOCAB], InputError, rf"tokens\[1\]: found {VOCAB}; accepted: 0 to {VOCAB - 1}"),
        ([7] * CONTEXT, ContextLengthError, f"found {CONTEXT} tokens.*up to {CONTEXT - 1}"),
        ([7] * (CONTEXT + 9), ContextLengthError, f"found {CONTEXT + 9}; accepted.*{CONTEXT}"),
    ],
)
def test_bad_prompts(tokenizer, session, prompt, error, message):
    with pytest.raises(error, match=message) as caught:
        Generation(session, tokenizer, prompt, SamplingParams())
    assert "\n" not in str(caught.value) and session.computed_tokens == 0


def test_chat_turns_reuse_the_cache(model, tokenizer, session):
    """Three turns over the switch; each answer is that of a fresh session."""
    messages = []
    for turn, text in enumerate(["hello world", "how are you", "the cat sat"]):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode_chat(messages)
        held = len(session)
        answer = finished(session, tokenizer, prompt, **GREEDY, max_tokens=9)
        fresh = finished(Session(model.compiled), tokenizer, prompt, **GREEDY, max_tokens=9)
        assert answer.token_ids == fresh.token_ids
        if turn == 2:  # long before and after: only what is new was computed
            assert held > ORIGINAL_MAX and answer.prefill_tokens < len(prompt)
        messages.append({"role": "assistant", "content": answer.text})
