"""Two thousand requests of the toy through one engine, with cancellations, preemption, eviction."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from pathlib import Path

import pytest
from test_engine import check_pages

import phi3c
from phi3c.engine.async_engine import AsyncEngine
from phi3c.engine.engine import Engine
from phi3c.engine.request import Request
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.sequence import Sequence
from phi3c.errors import InputError

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


def test_two_thousand_requests(toy, monkeypatch):
    rng = random.Random(1)
    engine = Engine(toy, max_total_seq_len=16 * 40)
    waiting, handles, cancelled, evicted = prompts(2000), [], 0, []
    evict = engine._prefixes.evict

    def evict_and_count(count: int) -> int:
        evicted.append(evict(count))
        return evicted[-1]

    monkeypatch.setattr(engine._prefixes, "evict", evict_and_count)
    while waiting or not engine.idle:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 2, 5]))):
            prompt = waiting.pop()
            n, priority = rng.choice([1] * 9 + [3]), rng.choice([0, 0, 0, 1])
            request = Request(prompt.messages(), GREEDY, n, priority)
            handles.append((engine.submit(request), prompt))
        engine.step()
        if rng.random() < 0.05 and handles:
            handle, _ = rng.choice(handles[-12:])
            cancelled += not handle.done
            engine.cancel(handle)
        check_pages(engine)
    answered = [(h, p) for h, p in handles if h.outputs[0].finish_reason != "cancelled"]
    right = sum(h.outputs[0].text == p.answer for h, p in answered)
    assert all(output == h.outputs[0] for h, _ in answered for output in h.outputs)
    metrics = engine.metrics()
    pages = sum(evicted)
    print(f"{right} of {len(answered)} right, {cancelled} cancelled, {pages} evicted; {metrics}")
    assert right >= 0.99 * len(answered)
    assert len(handles) == 2000 and metrics.cancelled == cancelled > 20
    assert pages > 100 and metrics.preemptions > 20 and metrics.pages_used == 0
    assert metrics.cached_tokens > 100 and metrics.refound_tokens > 1000


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


class Held:
    """A call of the engine that stops in the engine's thread until it is let go."""

    def __init__(self, monkeypatch, engine: Engine, name: str, fails: Exception | None = None):
        self._inside, self._goes_on = threading.Event(), threading.Event()
        call = getattr(engine, name)

        def held(*args):
            self._inside.set()
            assert self._goes_on.wait(60)
            if fails is not None:
                raise fails
            return call(*args)

        monkeypatch.setattr(engine, name, held)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._inside.wait, 60)

    def let_go(self) -> None:
        self._goes_on.set()


ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", ["step", "submit"])
def test_asyncio_submit_that_is_cancelled_leaves_no_request(toy, monkeypatch, name):
    """While a step runs before it, and while it runs itself."""

    async def run() -> None:
        engine = Engine(toy)
        async with AsyncEngine(engine) as served:
            handle = await served.submit(Request([5, 6], ENDLESS))
            held = Held(monkeypatch, engine, name)
            if name == "step":
                await held.reached()
            submitting = asyncio.create_task(served.submit(Request([7, 8], ENDLESS)))
            await held.reached()
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
            held.let_go()
            await served.cancel(handle)
            assert (await served.metrics()).cancelled == 2
            assert engine.idle

    asyncio.run(run())


def test_asyncio_submit_beside_a_step_that_fails(toy, monkeypatch):
    async def run() -> None:
        engine = Engine(toy)
        held = Held(monkeypatch, engine, "_run", fails=OSError("gone"))
        async with AsyncEngine(engine) as served:
            handle = await served.submit(Request([5, 6], GREEDY))
            await held.reached()
            submitting = asyncio.create_task(served.submit(Request([5, 7], GREEDY)))
            await held.reached()  # and the second one waits for the step
            held.let_go()
            with pytest.raises(RuntimeError, match="step failed: gone"):
                late = await submitting
                await asyncio.wait_for(anext(served.stream(late)), 60)
            with pytest.raises(RuntimeError, match="step failed: gone"):
                await anext(served.stream(handle))
            assert isinstance(handle.error.__cause__, OSError)
            assert engine.idle and engine.metrics().failed == 2

    asyncio.run(run())


def test_asyncio_cancel_by_another_ends_every_stream(toy):
    """Whenever the engine's thread ends a request, here between two looks at it."""

    async def read(served: AsyncEngine, handle) -> None:
        async for _ in served.stream(handle):
            pass

    async def run() -> None:
        engine = Engine(toy)
        async with AsyncEngine(engine) as served:
            first = await served.submit(Request([5, 6], ENDLESS))
            second = await served.submit(Request([7, 8], ENDLESS))
            reader = asyncio.create_task(read(served, first))
            await asyncio.sleep(0.02)
            take, calls = second.take, []

            def take_and_end():
                if not calls:
                    calls.append(served._thread.submit(engine.cancel, first).result())
                return take()

            second.take = take_and_end
            await asyncio.wait_for(reader, 60)
            assert calls and first.done
            await served.abort_all()
            await asyncio.wait_for(read(served, second), 60)

    asyncio.run(run())


def test_asyncio_handles(toy, monkeypatch):
    async def run() -> None:
        served = AsyncEngine(Engine(toy))
        with pytest.raises(RuntimeError, match="not running; use it as `async with"):
            await served.submit(Request([5, 6], GREEDY))
        async with served:
            handle = await served.submit(Request([5, 6], GREEDY))
            pieces = [piece async for piece in served.stream(handle)]
            assert [t for p in pieces for t in p.token_ids] == handle.outputs[0].token_ids
            assert [piece async for piece in served.stream(handle)] == []
            with pytest.raises(InputError, match="handle: found one of another engine"):
                await anext(served.stream(Engine(toy).submit(Request([5, 6], GREEDY))))
            failing = await served.submit(Request([5, 6], GREEDY))
            monkeypatch.setattr(Sequence, "sample", fails)
            with pytest.raises(RuntimeError, match="hold NaN"):
                _ = [piece async for piece in served.stream(failing)]

    def fails(self, logits):
        raise RuntimeError("cannot sample: logits hold NaN")

    asyncio.run(run())


def test_asyncio_leaving_does_not_stop_the_event_loop(toy, monkeypatch):
    async def run() -> None:
        served = AsyncEngine(Engine(toy))
        shutdown = served._grammar_thread.shutdown

        def shut_down(**options) -> None:
            leaving.set()
            shutdown(**options)

        monkeypatch.setattr(served._grammar_thread, "shutdown", shut_down)
        async with served:
            waiting = served._grammar_thread.submit(ticked.wait, 60)
            ticks = asyncio.create_task(tick())
        assert waiting.done() and waiting.result() and ticks.done()

    async def tick() -> None:
        """While leaving waits for the grammar's thread, which waits for this."""
        while not leaving.is_set():
            await asyncio.sleep(0.001)
        for _ in range(5):
            await asyncio.sleep(0.001)
        ticked.set()

    leaving, ticked = threading.Event(), threading.Event()
    asyncio.run(run())


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
