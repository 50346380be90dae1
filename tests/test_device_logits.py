"""Rows of logits that are copied when they are looked at: without a device, and by the engine on
each kind that is here."""

from __future__ import annotations

from pathlib import Path

import kernel_twins as twins
import numpy as np
import pytest
import tvm
from cuda_device import needs_gpu
from hypothesis import given
from hypothesis import strategies as st
from tvm.runtime import Tensor
from vulkan_device import needs_device

import phi3c
from phi3c.engine.draft_model import DraftModel
from phi3c.engine.engine import Engine
from phi3c.engine.grammar import Grammar
from phi3c.engine.logprobs import logprobs
from phi3c.engine.prompt_lookup import PromptLookup
from phi3c.engine.request import Handle, Request
from phi3c.engine.sampler import Sampler, SamplingParams
from phi3c.errors import InputError
from phi3c.logit_blocks import logit_blocks
from phi3c.runtime.device_logits import device_rows
from phi3c.runtime.logit_row import LogitRow

TOY = Path(__file__).parent.parent / "examples" / "toy" / "checkpoint"
SCHEME = "q0f32"
KINDS = {  # how requests are sampled, and whether more than the largest logits are needed
    "greedy": ({"temperature": 0}, False),
    "temperature": ({"temperature": 0.8}, True),
    "hot": ({"temperature": 3.0}, True),
    "top-k": ({"temperature": 1.5, "top_k": 5}, True),
    "top-p": ({"temperature": 1.5, "top_p": 0.9}, True),
    "min-p": ({"temperature": 1.5, "min_p": 0.05}, True),
    "repetition": ({"temperature": 0, "repetition_penalty": 1.3}, True),
    "frequency": ({"temperature": 1.0, "frequency_penalty": 1.0}, True),
    "bias": ({"temperature": 0, "logit_bias": {7: 5.0}}, True),
    "logprobs": ({"temperature": 0, "logprobs": 3}, True),
}


def maxima(logits: Tensor) -> Tensor:
    """As the kernel has them."""
    rows = logits.numpy()[0]
    tops, ids = twins.block_maxima(rows, logit_blocks(rows.shape[1]))
    packed = np.stack([tops.view(np.int32), ids.astype(np.int32)], axis=1)
    return tvm.runtime.tensor(packed)


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """Bytes of each copy to the host."""
    counted: list[int] = []
    numpy = Tensor.numpy

    def copied(tensor: Tensor) -> np.ndarray:
        array = numpy(tensor)
        counted.append(array.nbytes)
        return array

    monkeypatch.setattr(Tensor, "numpy", copied)
    return counted


# Without a device


def random_logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-40, 40, shape).astype(np.float32) / 8


@given(st.data())
def test_a_row_is_the_same_however_it_came(data):
    n, vocab = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 300))
    logits = random_logits(data.draw(st.integers(0, 99)), n, vocab)
    whole = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    name = data.draw(st.sampled_from(sorted(KINDS)))
    params = SamplingParams(**KINDS[name][0] | {"seed": 1})
    rows = device_rows(tvm.runtime.tensor(logits[None]), whole, maxima)
    assert len(rows) == n
    for row, expected in zip(rows, logits, strict=True):
        assert row.argmax() == expected.argmax() and row.size == vocab
        assert Sampler(params).sample(row) == Sampler(params).sample(expected)
        assert Sampler(params).likeliest(row, 4) == Sampler(params).likeliest(expected, 4)
        assert logprobs(row, 0, 2) == logprobs(expected, 0, 2)
        np.testing.assert_array_equal(row.tops, LogitRow(expected).tops)
        np.testing.assert_array_equal(row.table, LogitRow(expected).table)
        np.testing.assert_array_equal(row.logits, expected)


def test_what_is_copied(copies):
    """Neighbours that are wanted whole in one copy, the maxima of all others in one."""
    tensor = tvm.runtime.tensor(random_logits(0, 1, 6, 130))
    made = maxima(tensor)
    copies.clear()
    rows = device_rows(tensor, [True, True, False, True, False, False], lambda _: made)
    assert copies == [2 * 130 * 4, 130 * 4, 6 * 2 * 3 * 4]
    copies.clear()
    for row in rows:
        Sampler(SamplingParams(temperature=0)).sample(row)
    assert copies == []
    for _ in range(2):  # and kept
        Sampler(SamplingParams()).sample(rows[2])
    assert copies == [130 * 4]
    copies.clear()
    device_rows(tensor, [True] * 6, maxima)
    assert copies == [6 * 130 * 4]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("values", "found"), [(np.nan, "NaN"), (np.inf, r"\+inf"), (-np.inf, "nothing but -inf")]
)
def test_rows_that_nothing_can_be_drawn_from(values, found, whole):
    logits = random_logits(1, 2, 200)
    logits[1, 150 if values > 0 or values != values else slice(None)] = values
    good, bad = device_rows(tvm.runtime.tensor(logits[None]), [whole] * 2, maxima)
    for temperature in (0, 1):
        sampler = Sampler(SamplingParams(temperature=temperature))
        sampler.sample(good)
        with pytest.raises(RuntimeError, match=f"cannot sample: logits hold {found}"):
            sampler.sample(bad)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_a_row_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"logits: found shape \[.*\]; accepted: \[vocab\]"):
        LogitRow(np.zeros(shape, np.float32))


# On a device


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("vulkan", marks=needs_device),
        pytest.param("cuda:native", marks=needs_gpu),
    ],
)
def model(request, tmp_path_factory) -> phi3c.CompiledPhi3:
    folder = tmp_path_factory.mktemp("toy") / "artifact"
    phi3c.compile(TOY, request.param, SCHEME, folder)
    return phi3c.load(folder)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> phi3c.CompiledPhi3:
    folder = tmp_path_factory.mktemp("toy") / "artifact"
    phi3c.compile(TOY, "cpu", SCHEME, folder)
    return phi3c.load(folder)


def requests() -> list[Request]:
    """Of every kind, with several samples, and with a grammar."""
    prompts = ["reverse hello", "sort 4 2 9 1", "upper abc", "17 + 25", "copy copy copy copy"]
    made = []
    for i, (params, _) in enumerate(KINDS.values()):
        message = [{"role": "user", "content": prompts[i % len(prompts)]}]
        params = SamplingParams(**params | {"seed": i, "max_tokens": 16, "ignore_eos": True})
        made.append(Request(message, params, n=2 if i < 2 else 1))
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12)
    made.append(Request("sort 4 2 9 1", params, grammar=Grammar.regex("[a-d]{3}[0-9]+")))
    params = SamplingParams(temperature=0, max_tokens=12)
    made.append(Request("upper abc", params, grammar=Grammar.regex("[0-9]+")))
    return made


def answers(model: phi3c.CompiledPhi3, asked: list[Request], **options) -> list[list[list[int]]]:
    handles = Engine(model, **options).generate(asked)
    assert not any(handle.error for handle in handles), handles
    return [[output.token_ids for output in handle.outputs] for handle in handles]


@pytest.mark.parametrize("speculation", [None, "prompt-lookup", "draft-model", "draft-trees"])
def test_tokens_are_those_of_whole_downloads_and_of_the_cpu(
    model, on_cpu, speculation, monkeypatch
):
    def run(model) -> list[list[list[int]]]:
        made = {
            None: None,
            "prompt-lookup": PromptLookup(shortest=1, adaptive=False),
            "draft-model": DraftModel(model, adaptive=False),
            "draft-trees": DraftModel(model, width=2, adaptive=False),
        }
        return answers(model, requests(), speculation=made[speculation])

    found = run(model)
    assert found == run(on_cpu)
    with monkeypatch.context() as patch:
        patch.delitem(model._functions, "block_maxima")
        assert run(model) == found
    assert len({tuple(ids) for outputs in found for ids in outputs}) > len(KINDS)  # not trivial


def test_a_request_gets_its_tokens_alone_as_in_a_batch(model):
    asked = requests()
    assert [answers(model, [request])[0] for request in asked] == answers(model, asked)


def decoding(engine: Engine, kinds: list[str]) -> list[Handle]:
    """Requests of these kinds, past their prompts."""
    handles = []
    for i, kind in enumerate(kinds):
        params = KINDS[kind][0] | {"seed": i, "max_tokens": 40, "ignore_eos": True}
        handles.append(engine.submit(Request([5 + i, 9, 11, 23], SamplingParams(**params))))
    while not all(handle.outputs[0].token_ids for handle in handles):
        engine.step()
    return handles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_step(model, copies, kind, batch):
    engine = Engine(model)
    decoding(engine, [kind] * batch)
    copies.clear()
    engine.step()
    vocab = model.config.vocab_size
    row = 4 * vocab if KINDS[kind][1] else 8 * logit_blocks(vocab)
    assert copies == [batch * row]


def test_bytes_of_a_mixed_step(model, copies):
    engine = Engine(model)
    decoding(engine, ["greedy", "temperature", "top-k", "greedy"])
    copies.clear()
    engine.step()
    vocab = model.config.vocab_size
    assert copies == [2 * 4 * vocab, 4 * 8 * logit_blocks(vocab)]


def test_bytes_of_a_step_with_drafts(model, copies):
    """Greedy: the maxima of every node, in one copy."""
    engine = Engine(model, speculation=PromptLookup(shortest=1, adaptive=False))
    [handle] = decoding(engine, ["greedy"])
    nodes = []
    while not handle.done:
        copies.clear()
        drafted = engine.metrics().drafted_tokens
        engine.step()
        nodes.append(engine.metrics().drafted_tokens - drafted)
        assert copies == [(1 + nodes[-1]) * 8 * logit_blocks(model.config.vocab_size)]
    assert max(nodes) > 1


def test_bytes_of_a_chunk_of_a_prompt(model, copies):
    """Whose logits nothing is drawn from."""
    engine = Engine(model, max_step_tokens=model.manifest.limits.max_batch_size)
    engine.submit(Request(list(range(3, 33)), SamplingParams(max_tokens=1)))
    engine.step()
    assert copies == [8 * logit_blocks(model.config.vocab_size)]


@pytest.mark.parametrize("kind", ["greedy", "temperature"])
def test_nan_fails_the_sequence_that_has_it(model, kind, monkeypatch):
    expected = [h.outputs[0].token_ids for h in run_out(model, [kind] * 3)]
    batch_decode = model.batch_decode

    def broken(embed, cache):
        logits, cache = batch_decode(embed, cache)
        rows = logits.numpy()
        if len(rows) == 3:
            rows[1, 0, -1] = np.nan
        return tvm.runtime.tensor(rows, model._device.tvm), cache

    monkeypatch.setattr(model, "batch_decode", broken)
    first, second, third = run_out(model, [kind] * 3)
    assert isinstance(second.error, RuntimeError) and "NaN" in str(second.error)
    assert [first.outputs[0].token_ids, third.outputs[0].token_ids] == [expected[0], expected[2]]


def run_out(model: phi3c.CompiledPhi3, kinds: list[str]) -> list[Handle]:
    engine = Engine(model)
    handles = decoding(engine, kinds)
    while not engine.idle:
        engine.step()
    return handles


def test_the_cpu_has_no_such_function(model, on_cpu):
    assert "block_maxima" in model.manifest.functions
    assert "block_maxima" not in on_cpu.manifest.functions
    logits = random_logits(2, 2, 1, on_cpu.config.vocab_size)
    rows = on_cpu.logit_rows(tvm.runtime.tensor(logits), [False, True])
    np.testing.assert_array_equal([row.logits for row in rows], logits[:, 0])
