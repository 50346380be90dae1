"""The engine for asyncio: steps run in a thread of their own while there is work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

from phi3c.engine.engine import Engine
from phi3c.engine.metrics import Metrics
from phi3c.engine.request import Handle, Piece, Request
from phi3c.errors import InputError

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """Takes an engine over: everything that touches it runs in one thread, a call at a time.

    Use it once, as `async with AsyncEngine(engine) as served:`; leaving cancels what still runs.
    A step that fails fails all requests, and ends it.
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
        self._running = False
        self._failure: RuntimeError | None = None

    async def __aenter__(self) -> AsyncEngine:
        self._running = True
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._running = False
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._call(self._engine.abort_all)
        self._deliver()
        # Both may have to wait, for a thread and for a grammar.
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._grammar_thread.shutdown, cancel_futures=True)

    async def submit(self, request: Request) -> Handle:
        """As `Engine.submit`, and raises the same; RuntimeError if a step has failed.

        Who is cancelled while it waits leaves no request behind.
        """
        compiled = None
        self._check_running()
        if isinstance(request, Request) and request.grammar is not None:
            compiled = await asyncio.get_running_loop().run_in_executor(
                self._grammar_thread, self._engine.compile_grammar, request.grammar
            )
            self._check_running()
        made: list[Handle] = []
        try:
            await self._call(lambda: made.append(self._engine.submit(request, compiled)))
        except asyncio.CancelledError:
            # Behind it in the same thread; where that has ended, so have all requests.
            with contextlib.suppress(RuntimeError):
                self._thread.submit(lambda: [self._engine.cancel(handle) for handle in made])
            raise
        self._check_running()  # it has ended with the others if not
        [handle] = made
        self._queues[handle] = asyncio.Queue()
        self._open.append(handle)
        self._work.set()
        return handle

    async def stream(self, handle: Handle) -> AsyncIterator[Piece]:
        """The request's pieces as they come, for one reader.

        A reader who closes it before its end cancels the request. Raises what the request failed
        with, and InputError for a handle of another engine.
        """
        if handle not in self._queues:
            raise InputError("handle: found one of another engine; accepted: one of this engine's")
        queue = self._queues[handle]
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            queue.put_nowait(None)  # for whoever reads it again
        finally:
            if not handle.done:
                await self.cancel(handle)
        if handle.error is not None:
            raise handle.error.with_traceback(None)

    async def cancel(self, handle: Handle) -> None:
        """End a request; its stream ends too."""
        await self._call(self._engine.cancel, handle)
        self._work.set()

    async def abort_all(self) -> None:
        """End every request."""
        await self._call(self._engine.abort_all)
        self._work.set()

    async def metrics(self) -> Metrics:
        """The engine's counters."""
        return await self._call(self._engine.metrics)

    def _check_running(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if not self._running:
            raise RuntimeError(
                "AsyncEngine: not running; use it as `async with AsyncEngine(engine) as served:`"
            )

    async def _run(self) -> None:
        try:
            while True:
                self._deliver()
                if self._engine.idle:
                    self._work.clear()
                    await self._work.wait()
                else:
                    await self._call(self._engine.step)
        except Exception as error:
            # From here on nobody's submit is queued; those that are come before abort_all.
            self._failure = RuntimeError(f"the engine's step failed: {error}")
            self._failure.__cause__ = error
            await self._call(self._engine.abort_all, self._failure)
            self._deliver()

    def _deliver(self) -> None:
        still_open = []
        for handle in self._open:
            done = handle.done  # once, and first: the engine's thread may end it at any time
            for piece in handle.take():
                self._queues[handle].put_nowait(piece)
            if done:
                self._queues[handle].put_nowait(None)
            else:
                still_open.append(handle)
        self._open = still_open

    def _call(self, function: Callable, *args: Any) -> asyncio.Future:
        """Run it in the engine's thread, whatever becomes of the caller."""
        loop = asyncio.get_running_loop()
        return asyncio.shield(loop.run_in_executor(self._thread, function, *args))
