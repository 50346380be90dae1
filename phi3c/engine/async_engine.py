"""The engine for asyncio: steps run in a thread of their own while there is work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

from phi3c.engine.engine import Engine
from phi3c.engine.metrics import Metrics
from phi3c.engine.request import Handle, Piece, Request

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """Takes an engine over: everything that touches it runs in one thread, a call at a time.

    Use it as `async with AsyncEngine(engine) as served:`; leaving cancels what still runs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "phi3c-engine")
        # Grammars are compiled beside the steps, one after the other.
        self._grammar_thread = ThreadPoolExecutor(1, "phi3c-grammar")
        # Pieces of each request, then None; kept as long as somebody keeps the handle.
        self._queues: WeakKeyDictionary[Handle, asyncio.Queue[Piece | None]] = WeakKeyDictionary()
        self._open: list[Handle] = []
        self._work = asyncio.Event()
        self._loop: asyncio.Task | None = None

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._call(self._engine.abort_all)
        self._deliver()
        self._thread.shutdown()
        self._grammar_thread.shutdown(cancel_futures=True)

    async def submit(self, request: Request) -> Handle:
        """As `Engine.submit`, and raises the same; RuntimeError if the step loop has failed."""
        compiled = None
        if request.grammar is not None:
            compiled = await asyncio.get_running_loop().run_in_executor(
                self._grammar_thread, self._engine.compile_grammar, request.grammar
            )
        self._check_loop()
        handle = await self._call(self._engine.submit, request, compiled)
        self._queues[handle] = asyncio.Queue()
        self._open.append(handle)
        self._work.set()
        return handle

    async def stream(self, handle: Handle) -> AsyncIterator[Piece]:
        """The request's pieces as they come, for one reader; a reader who leaves cancels it.

        Raises RuntimeError if the step loop has failed.
        """
        try:
            while (piece := await self._queues[handle].get()) is not None:
                yield piece
        finally:
            if not handle.done:
                await self.cancel(handle)
        self._check_loop()

    async def cancel(self, handle: Handle) -> None:
        """End a request; its stream ends too."""
        await self._call(self._engine.cancel, handle)
        self._work.set()

    async def metrics(self) -> Metrics:
        """The engine's counters."""
        return await self._call(self._engine.metrics)

    def _check_loop(self) -> None:
        if self._loop.done() and not self._loop.cancelled():
            raise RuntimeError("the engine's step failed") from self._loop.exception()

    async def _run(self) -> None:
        try:
            while True:
                self._deliver()
                if self._engine.idle:
                    self._work.clear()
                    await self._work.wait()
                else:
                    await self._call(self._engine.step)
        except Exception:
            self._engine.abort_all()  # the thread is idle: nothing else calls it while it failed
            self._deliver()
            raise

    def _deliver(self) -> None:
        for handle in self._open:
            for piece in handle.take():
                self._queues[handle].put_nowait(piece)
            if handle.done:
                self._queues[handle].put_nowait(None)
        self._open = [handle for handle in self._open if not handle.done]

    async def _call(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
