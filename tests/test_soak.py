"""Two thousand requests of the toy through one engine, with cancellations, preemption, eviction."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest
from test_engine import check_pages

import phi3c
from phi3c.engine.async_engine import AsyncEngine
from phi3c.engine.engine import Engine
from phi3c.engine.request import Request
from phi3c.engine.sampler import SamplingParams

TOY = Path(__file__).parent.parent / "examples" / "toy"
sys.path.insert(0, str(TOY))
import tasks  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak") / "toy"
    phi3c.compile(TOY / "checkpoint", quantization="q0f32", output=folder, max_batch_size=8)
    return phi3c.load(folder, threads=1)


def prompts(count: int) -> list[tasks.Prompt]:
    """Of every task; short, crossing original_max, past it; shuffled."""
    kinds = (tasks.short_prompts, tasks.crossing_prompts, tasks.long_prompts)
    each = -(-count // (len(tasks.TASKS) * len(kinds)))
    made = [p for task in tasks.TASKS for kind in kinds for p in kind(task, each, 3)]
    random.Random(0).shuffle(made)
    return made[:count]


def test_two_thousand_requests(toy):
    rng = random.Random(1)
    engine = Engine(toy, max_total_seq_len=16 * 40)
    waiting, handles, cancelled = prompts(2000), [], 0
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 2, 5]))):
            prompt = waiting.pop()
            request = Request(prompt.messages(), GREEDY, priority=rng.choice([0, 0, 0, 1]))
            handles.append((engine.submit(request), prompt))
        engine.step()
        if rng.random() < 0.05 and handles:
            handle, _ = rng.choice(handles[-12:])
            cancelled += not handle.done
            engine.cancel(handle)
        check_pages(engine)
    answered = [(h, p) for h, p in handles if h.outputs[0].finish_reason != "cancelled"]
    right = sum(h.outputs[0].text == p.answer for h, p in answered)
    metrics = engine.metrics()
    print(f"{right} of {len(answered)} right, {cancelled} cancelled; {metrics}")
    assert right >= 0.99 * len(answered)
    assert len(handles) == 2000 and metrics.cancelled == cancelled > 20
    assert metrics.preemptions > 20 and metrics.cached_tokens > 1000 and metrics.pages_used == 0


def test_asyncio_streams_many_at_once(toy):
    async def ask(served: AsyncEngine, prompt: tasks.Prompt) -> str:
        handle = await served.submit(Request(prompt.messages(), GREEDY))
        return "".join([piece.text async for piece in served.stream(handle)])

    async def run() -> list[str]:
        engine = Engine(toy)
        async with AsyncEngine(engine) as served:
            texts = await asyncio.gather(*[ask(served, p) for p in asked])
            # A reader who leaves cancels; so does the end of the block.
            handle = await served.submit(
                Request([5, 6], SamplingParams(temperature=0, ignore_eos=True))
            )
            stream = served.stream(handle)
            await anext(stream)
            await stream.aclose()
            assert handle.outputs[0].finish_reason == "cancelled"
            left = await served.submit(Request([5, 6], SamplingParams(ignore_eos=True)))
        assert left.outputs[0].finish_reason == "cancelled" and engine.idle
        assert engine.metrics().pages_used == 0
        return texts

    asked = prompts(60)
    texts = asyncio.run(run())
    assert sum(text == p.answer for text, p in zip(texts, asked, strict=True)) >= 59


def test_asyncio_reports_a_failed_step(toy, monkeypatch):
    def fails(parts):
        raise OSError("gone")

    async def run() -> None:
        engine = Engine(toy)
        monkeypatch.setattr(engine, "_run", fails)
        async with AsyncEngine(engine) as served:
            handle = await served.submit(Request([5, 6], GREEDY))
            with pytest.raises(RuntimeError, match="step failed") as error:
                _ = [piece async for piece in served.stream(handle)]
            assert isinstance(error.value.__cause__, OSError)
            with pytest.raises(RuntimeError, match="step failed"):
                await served.submit(Request([5, 6], GREEDY))

    asyncio.run(run())
