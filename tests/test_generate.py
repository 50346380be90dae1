"""One user's answers against transformers' generate(), LongRoPE's switch above all."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import longrope
from tokenizers import decoders, models, pre_tokenizers, trainers

import phi3c
from phi3c.engine.answer import Answer
from phi3c.engine.engine import Engine
from phi3c.engine.request import Request
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import ContextLengthError, InputError
from phi3c.memory import sequence_cache_tokens
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.logit_row import LogitRow

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
def engine(model, tokenizer):
    return for_one_user(model.compiled, tokenizer)


def for_one_user(compiled: CompiledPhi3, tokenizer: Tokenizer) -> Engine:
    """With the pages that `generate` and `chat` give it."""
    return Engine(
        compiled, tokenizer, max_total_seq_len=sequence_cache_tokens(compiled.manifest, 16)
    )


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(7, VOCAB, n).tolist()


def finished(engine: Engine, prompt, **params) -> Answer:
    answer = Answer(engine, Request(prompt, SamplingParams(**params)))
    pieces = list(answer)
    assert "".join(pieces) == answer.output.text and all(pieces)
    assert engine.idle and engine.metrics().pages_used == 0
    return answer


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


@pytest.mark.parametrize("prompt", [1, 24, ORIGINAL_MAX - 1, ORIGINAL_MAX, ORIGINAL_MAX + 1, 50])
def test_greedy_is_transformers_generate(model, tokenizer, engine, prompt):
    ids = random_ids(prompt, seed=prompt)
    n = 80 - prompt if prompt == 24 else 12
    answer = finished(engine, ids, **GREEDY, max_tokens=n)
    assert answer.output.token_ids == oracle_tokens(model, ids, n)
    assert answer.output.finish_reason == "length"
    assert answer.output.text == tokenizer.decode(answer.output.token_ids)
    assert answer.prefill_tokens == prompt
    assert answer.prefill_seconds > 0 and answer.decode_seconds > 0


def test_the_switch_recomputes_once(engine):
    finished(engine, random_ids(20), **GREEDY, max_tokens=ORIGINAL_MAX)
    computed = 20 + ORIGINAL_MAX - 1
    assert engine.metrics().computed_tokens == computed + ORIGINAL_MAX


def test_nothing_runs_before_the_iteration(engine):
    answer = Answer(engine, Request(random_ids(5), SamplingParams(**GREEDY)))
    assert engine.metrics().computed_tokens == 0 and answer.output.finish_reason is None
    next(iter(answer))
    assert answer.output.finish_reason is None and answer.output.token_ids
    answer.close()
    assert answer.output.finish_reason == "cancelled" and not list(answer)
    assert engine.idle and engine.metrics().pages_used == 0


def test_end_of_sequence(model, engine, tmp_path):
    ids = random_ids(24)
    tokens = finished(engine, ids, **GREEDY, max_tokens=40).output.token_ids
    end = next(i for i in range(5, 40) if tokens[i] not in tokens[:i])
    write_tokenizer(tmp_path, eos=[2, tokens[end]])
    ending = for_one_user(model.compiled, Tokenizer.from_folder(tmp_path))
    output = finished(ending, ids, temperature=0.0, max_tokens=40).output
    assert output.token_ids == tokens[: end + 1]
    assert output.token_ids == oracle_tokens(model, ids, 40, eos=tokens[end])
    assert output.finish_reason == "stop"
    # The last token that max_tokens allows may be the end too.
    last = finished(ending, ids, temperature=0.0, max_tokens=end + 1)
    assert last.output.finish_reason == "stop"
    ignoring = finished(ending, ids, **GREEDY, max_tokens=40).output
    assert ignoring.token_ids == tokens and ignoring.finish_reason == "length"


def test_config_ends_too(tokenizer, engine, monkeypatch):
    """The model's config names eos 2; here the tokenizer's files name none."""
    monkeypatch.setattr(tokenizer, "_eos_token_ids", frozenset())
    bias = {2: 100.0}
    output = finished(engine, [9, 10, 11], temperature=0.0, logit_bias=bias).output
    assert output.token_ids == [2] and output.finish_reason == "stop"


def test_stop_strings(engine):
    ids = random_ids(24)
    whole = finished(engine, ids, **GREEDY, max_tokens=60).output
    stop = whole.text[11:15]
    stopped = finished(engine, ids, **GREEDY, max_tokens=60, stop=("never there", stop)).output
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(whole.token_ids)
    # What could begin a stop string is given back at the end.
    held = finished(engine, ids, **GREEDY, max_tokens=60, stop=(whole.text[-3:] + "!",)).output
    assert held.text == whole.text and held.finish_reason == "length"


def test_seeds(engine):
    ids = random_ids(24)

    def sample(seed):
        return finished(engine, ids, seed=seed, max_tokens=30).output.token_ids

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


@pytest.mark.parametrize("prompt", [24, CONTEXT - 1])
@pytest.mark.parametrize("max_tokens", [None, 10**9])
def test_until_the_context_is_full(engine, prompt, max_tokens):
    output = finished(engine, random_ids(prompt), **GREEDY, max_tokens=max_tokens).output
    assert len(output.token_ids) == CONTEXT - prompt
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    "prompt, error, message",
    [
        ([], InputError, "found no tokens"),
        ([5, VOCAB], InputError, rf"prompt\[1\]: found {VOCAB}; accepted: 0 to {VOCAB - 1}"),
        ([7] * CONTEXT, ContextLengthError, f"found {CONTEXT} tokens.*up to {CONTEXT - 1}"),
        ([7] * (CONTEXT + 9), ContextLengthError, f"found {CONTEXT + 9}.*{CONTEXT - 1}"),
    ],
)
def test_bad_prompts(engine, prompt, error, message):
    with pytest.raises(error, match=message) as caught:
        Answer(engine, Request(prompt, SamplingParams()))
    assert "\n" not in str(caught.value) and engine.metrics().computed_tokens == 0


def test_what_a_request_failed_with_is_raised(engine, monkeypatch):
    monkeypatch.setattr(
        "phi3c.engine.sequence.Sequence._penalised",
        lambda self, row: LogitRow(row.logits * np.float32("nan")),
    )
    with pytest.raises(RuntimeError, match="cannot sample: logits hold NaN"):
        finished(engine, random_ids(5), **GREEDY)
    assert engine.idle


@pytest.mark.parametrize("call", ["embed", "batch_prefill", "decode"])
def test_an_interrupted_step_leaves_a_usable_engine(model, engine, monkeypatch, call):
    """Ctrl-C in the middle of a forward: the request is cancelled, its pages are given back."""
    ids, calls = random_ids(60), []
    run = getattr(engine.model, call)

    def interrupted(*args):
        calls.append(call)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(engine.model, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        finished(engine, ids, **GREEDY, max_tokens=20)
    monkeypatch.undo()
    assert engine.idle and engine.metrics().pages_used == 0
    again = finished(engine, ids, **GREEDY, max_tokens=20)
    assert again.output.token_ids == oracle_tokens(model, ids, 20)


def turns(engine: Engine, fresh_engine, questions: list[str], max_tokens: int) -> list[Answer]:
    """The answers of a chat; each is that of a fresh engine to the whole conversation."""
    messages, answers = [], []
    for text in questions:
        messages.append({"role": "user", "content": text})
        answer = finished(engine, list(messages), **GREEDY, max_tokens=max_tokens)
        fresh = finished(fresh_engine(), list(messages), **GREEDY, max_tokens=max_tokens)
        assert answer.output.token_ids == fresh.output.token_ids
        messages.append({"role": "assistant", "content": answer.output.text})
        answers.append(answer)
    return answers


def test_chat_turns_reuse_the_cache(model, tokenizer, engine):
    """Three turns over the switch; past it whole pages of the last turn are found again."""
    questions = ["hello world", "how are you", "the cat sat"]
    answers = turns(engine, lambda: for_one_user(model.compiled, tokenizer), questions, 9)
    before, last = answers[1:]
    held = len(before.handle.prompt_ids) + 8
    assert held > ORIGINAL_MAX  # long factors then and now
    shared = common(before.handle.prompt_ids + before.output.token_ids, last.handle.prompt_ids)
    assert last.handle.cached_tokens == shared // 16 * 16 > 0
    assert last.prefill_tokens == len(last.handle.prompt_ids) - last.handle.cached_tokens


def test_chat_with_a_sliding_window(build_model, tokenizer):
    """Turns longer than the pages, which hold the window and a chunk, find the window again."""
    window = dict(vocab_size=VOCAB, sliding_window=24)
    model = on_one_thread(build_model("generate-window", compile_options=SMALL, **window))

    def new_engine() -> Engine:
        return for_one_user(model.compiled, tokenizer)

    engine = new_engine()
    assert engine.metrics().pages_free < CONTEXT // 16
    answers = turns(engine, new_engine, ["hello", "the cat sat on the mat", "and the dog ran"], 16)
    for before, answer in pairwise(answers):
        prompt = answer.handle.prompt_ids
        shared = common(before.handle.prompt_ids + before.output.token_ids[:-1], prompt)
        assert answer.handle.cached_tokens == shared // 16 * 16
        assert answer.output.token_ids == oracle_tokens(model, prompt, 16)
    assert len(prompt) + 16 > engine._cache.num_pages * 16


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
