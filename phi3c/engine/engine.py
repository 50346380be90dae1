"""The step loop: many requests through one compiled model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property

import numpy as np
from tvm.runtime import Tensor

from phi3c.engine.generation_config import generation_defaults
from phi3c.engine.grammar import Grammar, GrammarLimits
from phi3c.engine.grammar_compiler import GrammarCompiler
from phi3c.engine.grammar_state import CompiledGrammar
from phi3c.engine.metrics import Metrics
from phi3c.engine.prefix_cache import PrefixCache
from phi3c.engine.request import Handle, Output, Piece, Request, prompt_tokens
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.scheduler import Part, Scheduler
from phi3c.engine.sequence import Sequence
from phi3c.engine.speculation import Speculation, SpeculationOptions
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import AdapterError, CacheFullError, ContextLengthError, InputError
from phi3c.manifest import Limits
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.logit_row import LogitRow

__all__ = ["Engine"]


class Engine:
    """Runs requests together. Not for several Python threads at once."""

    def __init__(
        self,
        model: CompiledPhi3,
        tokenizer: Tokenizer | None = None,
        max_total_seq_len: int | None = None,
        page_size: int = 16,
        prefix_cache: bool = True,
        speculation: SpeculationOptions | None = None,
        reproducible: bool = False,
        grammar_limits: GrammarLimits | None = None,
        max_step_tokens: int | None = None,
    ) -> None:
        """tokenizer: of the artifact by default, if it has one. max_total_seq_len: tokens of KV
        pages, by default what `create_paged_kv_cache` makes. speculation: PromptLookup or
        DraftModel; the tokens are the same with and without, but for near ties (speculation.py).
        reproducible: for these too, and whatever is preempted or found in the prefix cache: logits
        have the same bits with and without chains of drafts, decoding is somewhat slower.
        grammar_limits: GrammarLimits() by default. max_step_tokens: the most tokens of a step, from
        a token a sequence (the artifact's max_batch_size) to its prefill_chunk_size, the default: a
        smaller one bounds how long a running answer waits for its next token beside a long prompt,
        which is computed somewhat slower.
        Raises OutOfMemoryError, InputError.
        """
        if not isinstance(model, CompiledPhi3):
            raise InputError(
                f"model: found {model!r}; accepted: a CompiledPhi3, as phi3c.load(path) returns"
            )
        limits = _step_limits(model.manifest.limits, max_step_tokens)
        if tokenizer is None and (model.artifact.path / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_folder(model.artifact.path)
        self.model = model
        self.tokenizer = tokenizer
        room = {} if max_total_seq_len is None else {"max_total_seq_len": max_total_seq_len}
        self._cache = model.create_paged_kv_cache(
            page_size=page_size, prefill_chunk_size=limits.prefill_chunk_size, **room
        )
        self._reproducible = reproducible
        self._prefixes = None
        if prefix_cache:
            self._prefixes = PrefixCache(self._cache, model.config.sliding_window)
        self._scheduler = Scheduler(self._cache, self._prefixes, model.config, limits, model)
        self._speculation = None
        if speculation is not None:
            drafter = speculation.start(model, self._cache.num_pages * page_size)
            self._speculation = Speculation(drafter, speculation.adaptive)
        self._grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            self._grammars = GrammarCompiler(
                tokenizer,
                model.config.vocab_size,
                self._ends(),
                grammar_limits or GrammarLimits(),
            )
        self._submitted: dict[Handle, float] = {}  # → when; until it is done
        self._next_id = self._arrivals = 0
        self._metrics = Metrics()

    def submit(self, request: Request, compiled: CompiledGrammar | None = None) -> Handle:
        """Queue a request. Raises InputError, ContextLengthError, CacheFullError where it could
        never fit, and AdapterError where its adapter is not loaded; then nothing is queued.

        compiled: its grammar, if `compile_grammar` has made it elsewhere; otherwise this waits.
        """
        if not isinstance(request, Request):
            raise InputError(f"request: found {request!r}; accepted: a Request")
        if request.params is None:
            request = replace(request, params=self._default_params)
        prompt_ids = self._checked(prompt_tokens(request.prompt, self.tokenizer))
        if request.params.stop and self.tokenizer is None:
            raise InputError("stop: found strings; accepted: none, as the engine has no tokenizer")
        self._check_bias(request.params.logit_bias)
        max_tokens = self._room(len(prompt_ids), request.params.max_tokens)
        if request.grammar is not None and compiled is None:
            compiled = self.compile_grammar(request.grammar)
        handle = Handle(request, prompt_ids, [Output() for _ in range(request.n)])
        self._arrivals += 1
        sequence = self._sequence(handle, max_tokens, compiled)
        if request.adapter is not None:
            handle.adapter = self.model.hold_adapter(request.adapter)
        self._scheduler.wait(sequence)
        self._submitted[handle] = time.perf_counter()
        self._metrics.requests += 1
        return handle

    def compile_grammar(self, grammar: Grammar) -> CompiledGrammar:
        """What `submit` takes; kept for the next request of the same grammar. Takes up to the
        limits' seconds, and may be called in any thread. Raises InputError."""
        if self._grammars is None:
            raise InputError("grammar: found one; accepted: none, as the engine has no tokenizer")
        if not self._ends():
            raise InputError("grammar: found one; accepted: none, as the model has no eos token")
        return self._grammars.compile(grammar)

    def step(self) -> list[Handle]:
        """One forward for everything that can run; the requests that it finished.

        What interrupts it (Ctrl-C) takes nothing from the requests: the next step goes on with
        them, without those that were finished before it came.
        """
        start = time.perf_counter()
        parts = self._scheduler.plan()
        if not parts:
            return self._fail_without_slot()
        parts, rows = self._run(self._with_drafts(parts))
        complete = [part for part in parts if part.complete]
        self._scheduler.ran(parts)
        sampled: list[Sequence] = []
        try:
            self._advance(complete, rows, sampled)
        finally:
            self._scheduler.take_back()
            done = self._collect(sampled)
        self._metrics.steps += 1
        self._metrics.step_seconds += time.perf_counter() - start
        return done

    def stream(self, handle: Handle) -> Iterator[Piece]:
        """The pieces of a request's samples, stepping as long as it runs.

        Who closes the iterator before its end (`break` does) cancels the request. Raises what the
        request failed with, and InputError for a handle of another engine.
        """
        if not handle.done and handle not in self._submitted:
            raise InputError("handle: found one of another engine; accepted: one of this engine's")
        return self._stream(handle)

    def _stream(self, handle: Handle) -> Iterator[Piece]:
        try:
            while True:
                yield from handle.take()
                if handle.done:
                    break
                self.step()
        finally:
            self.cancel(handle)
        if handle.error is not None:
            raise handle.error

    def generate(self, requests: Iterable[Request]) -> list[Handle]:
        """Runs them all to their ends; their handles, in order. One that fails carries its error.

        Raises as `submit` does, and then runs none; what interrupts it cancels them.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(request))
            while not all(handle.done for handle in handles):
                self.step()
        finally:
            for handle in handles:
                self.cancel(handle)
        return handles

    def cancel(self, handle: Handle) -> None:
        """End a request; what it holds is given back. Does nothing if it is done."""
        if handle in self._submitted:
            self._end(handle, "cancelled")
            self._metrics.cancelled += 1

    def abort_all(self, error: RuntimeError | None = None) -> None:
        """Cancel every request; with an error each fails with it."""
        for handle in list(self._submitted):
            if error is None:
                self.cancel(handle)
            else:
                self._fail(handle, error)

    @property
    def idle(self) -> bool:
        """Whether no request is queued or running."""
        return not self._submitted

    def metrics(self) -> Metrics:
        """Counters, as they are now."""
        cached, free = self._cache.num_idle_pages, self._cache.num_free_pages
        return replace(
            self._metrics,
            pages_free=free,
            pages_cached=cached,
            pages_used=self._cache.num_pages - free - cached,
            preemptions=self._scheduler.preemptions,
            cached_tokens=self._scheduler.cached_tokens,
            refound_tokens=self._scheduler.refound_tokens,
        )

    # A step

    def _with_drafts(self, parts: list[Part]) -> list[Part]:
        if self._speculation is None:
            return parts
        budget, room = self._scheduler.draft_budget(parts), self._scheduler.draft_room
        return self._speculation.add_drafts(parts, budget, room)

    def _run(self, parts: list[Part]) -> tuple[list[Part], list[LogitRow]]:
        """The forward of as many parts as have room; logits of each complete part's last token
        and of its draft's tokens."""
        while parts:
            counts = [part.size for part in parts]
            ids = [part.sequence.id for part in parts]
            slots = [part.sequence.slot for part in parts for _ in range(part.size)]
            parents = None
            if any(part.draft for part in parts):
                parents = [parent for part in parts for parent in part.parents]
            try:
                with self._cache.forward(ids, counts, parents, slots):
                    start = time.perf_counter()
                    rows = self._forward(parts)
            except CacheFullError:
                parts = self._scheduler.retreat(parts)
                continue
            seconds = time.perf_counter() - start
            if self._speculation is not None:
                self._speculation.ran(parts, seconds)
            self._metrics.model_seconds += seconds
            self._metrics.computed_tokens += sum(counts)
            self._metrics.sequence_steps += len(parts)
            return parts, rows
        return [], []

    def _forward(self, parts: list[Part]) -> list[LogitRow]:
        embed = self.model.embed([token for part in parts for token in part.tokens])
        single = all(part.size == 1 for part in parts)
        if any(part.draft for part in parts) or (single and self._reproducible):
            return self._verify(parts, embed)
        if single:
            run = self.model.decode if len(parts) == 1 else self.model.batch_decode
            logits, _ = run(embed, self._cache)
            rows = self._rows(logits, parts)
            return [row for row, part in zip(rows, parts, strict=True) if part.complete]
        ends = np.cumsum([part.count for part in parts]) - 1
        complete = [part for part in parts if part.complete]
        asked = ends[[part.complete for part in parts]]
        some = asked if asked.size else ends[-1:]  # the function wants a row
        logits, _ = self.model.batch_prefill(embed, some, self._cache)
        return self._rows(logits, complete or parts[-1:])[: asked.size]

    def _rows(self, logits: Tensor, parts: list[Part]) -> list[LogitRow]:
        """A row for each part, and one for each token of its draft."""
        each = ((p.complete and p.sequence.needs_all_logits, 1 + len(p.draft)) for p in parts)
        return self.model.logit_rows(logits, [needs for needs, n in each for _ in range(n)])

    def _verify(self, parts: list[Part], embed: Tensor) -> list[LogitRow]:
        """A forward for logits of several tokens of a sequence. The large head is left out for
        those of a prompt."""
        if all(part.count == 1 and part.complete for part in parts):
            logits, _ = self.model.batch_verify(embed, self._cache)
            return self._rows(logits, parts)
        hidden, _ = self.model.batch_verify_to_last_hidden_states(embed, self._cache)
        asked: list[int] = []
        start = 0
        for part in parts:
            if part.complete:
                asked += range(start + part.count - 1, start + part.size)
            start += part.size
        hidden = hidden.numpy()[:, asked or [0]]  # the function wants one
        complete = [part for part in parts if part.complete]
        return self._rows(self.model.get_logits(hidden), complete or parts[:1])[: len(asked)]

    def _advance(self, parts: list[Part], rows: list[LogitRow], sampled: list[Sequence]) -> None:
        """Sample what a forward gave logits for. sampled: the sequences that have new tokens."""
        nodes = {part: -1 for part in parts if part.draft}  # → the last right one of the draft
        try:
            for part in parts:
                own, rows = rows[: 1 + len(part.draft)], rows[1 + len(part.draft) :]
                forks = self._forks(part.sequence)
                for sequence in (part.sequence, *forks):
                    sampled.append(sequence)
                    self._sample(sequence, own[0])
                if part.draft:
                    self._descend(part, own[1:], nodes)
        finally:
            self._scheduler.accept(nodes)

    def _descend(self, part: Part, rows: list[LogitRow], nodes: dict[Part, int]) -> None:
        """Sample on as long as the last token is in the draft, whose logits these are
        (speculation.py says why that is exact)."""
        sequence, node = part.sequence, -1
        while not sequence.finished and sequence.handle.error is None:
            node = part.draft.child(node, sequence.tokens[-1])
            if node is None:
                break
            nodes[part] = node
            self._sample(sequence, rows[node])
        depth = part.draft.depth(nodes[part])
        self._speculation.accepted(part, depth)
        self._metrics.drafted_tokens += len(part.draft)
        self._metrics.accepted_tokens += depth

    def _sample(self, sequence: Sequence, row: LogitRow) -> None:
        handle = sequence.handle
        try:
            sequence.sample(row)
        except RuntimeError as error:  # logits, or a grammar, that nothing can be drawn from
            handle.error = error
            return
        self._count_tokens(sequence, 1)

    def _count_tokens(self, sequence: Sequence, count: int) -> None:
        """So many tokens of a sequence have come at once."""
        metrics, now = self._metrics, time.perf_counter()
        metrics.generated_tokens += count
        if len(sequence.output.token_ids) > count:
            metrics.later_tokens += count
            metrics.later_token_seconds += now - sequence.sampled_at
        elif sequence.index == 0:
            metrics.first_tokens += 1
            metrics.first_token_seconds += now - self._submitted[sequence.handle]
        sequence.sampled_at = now

    def _forks(self, sequence: Sequence) -> list[Sequence]:
        """The other samples of a request whose prompt was just computed."""
        handle = sequence.handle
        forks = []
        if sequence.index == 0 and not sequence.output.token_ids:
            while sequence.forks + 1 < handle.request.n:  # more than none if it was interrupted
                fork = sequence.another(self._new_id(), sequence.forks + 1)
                self._scheduler.fork(sequence, fork)
                sequence.forks += 1
                forks.append(fork)
        return forks

    def _collect(self, sampled: Seq[Sequence]) -> list[Handle]:
        """Give back what finished sequences hold; the requests that are done now."""
        for sequence in sampled:
            if sequence.finished:
                self._remove(sequence)
        done = []
        for handle in dict.fromkeys(sequence.handle for sequence in sampled):
            if handle.error is not None:
                self._fail(handle, handle.error)
            elif handle.done:
                self._forget(handle)
                self._metrics.finished += 1
            else:
                continue
            done.append(handle)
        return done

    # Requests

    def _checked(self, ids: Seq[int]) -> list[int]:
        vocab = self.model.config.vocab_size
        if not len(ids):
            raise InputError("prompt: found no tokens; accepted: at least one")
        for at, token_id in enumerate(ids):
            integer = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not integer or not 0 <= token_id < vocab:
                raise InputError(
                    f"prompt[{at}]: found {token_id!r}; accepted: 0 to {vocab - 1} (vocab_size)"
                )
        return [int(token_id) for token_id in ids]

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        vocab = self.model.config.vocab_size
        if wrong := [token for token in bias if token >= vocab]:
            raise InputError(
                f"logit_bias: found token {wrong[0]}; accepted: 0 to {vocab - 1} (vocab_size)"
            )

    def _room(self, prompt: int, max_tokens: int | None) -> int:
        """Tokens the answer may have. Raises ContextLengthError, CacheFullError."""
        limits, pages = self.model.manifest.limits, self._cache.num_pages
        room = limits.context_length - prompt
        if room < 1:
            raise ContextLengthError(
                f"prompt: found {prompt} tokens; accepted: up to {limits.context_length - 1}, so "
                "that the context has room for an answer"
            )
        if max_tokens is None:  # as far as context and pages reach
            if self._scheduler.pages_of(prompt + room - 1) > pages:
                room = max(1, pages * self._cache.page_size - prompt + 1)
        else:
            room = min(room, max_tokens)
        needed = self._scheduler.pages_of(prompt + room - 1)  # the last is never computed
        if needed > pages:
            raise CacheFullError(
                f"request: found {prompt} prompt tokens and up to {room} more, which need {needed} "
                f"KV pages of {self._cache.page_size} tokens at once; accepted: up to {pages}"
            )
        return room

    def _ends(self) -> frozenset[int]:
        ends = frozenset(self.model.config.eos_token_ids)
        return ends if self.tokenizer is None else self.tokenizer.eos_token_ids | ends

    def _sequence(
        self, handle: Handle, max_tokens: int, grammar: CompiledGrammar | None
    ) -> Sequence:
        return Sequence(
            self._new_id(),
            handle,
            self._arrivals,
            max_tokens,
            frozenset() if handle.request.params.ignore_eos else self._ends(),
            self.tokenizer,
            self.model.config.vocab_size,
            grammar,
        )

    @cached_property
    def _default_params(self) -> SamplingParams:
        return SamplingParams(**generation_defaults(self.model.artifact.path))

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _fail(self, handle: Handle, error: Exception) -> None:
        handle.error = error
        self._end(handle, "error")
        self._metrics.failed += 1

    def _end(self, handle: Handle, reason: str) -> None:
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.handle is handle:
                self._remove(sequence, keep_prefix=handle.error is None)
        for output in handle.outputs:
            output.finish_reason = output.finish_reason or reason
        self._forget(handle)

    def _fail_without_slot(self) -> list[Handle]:
        """Where nothing runs and a request waits, others than this engine hold every slot."""
        if self._scheduler.running or not self._scheduler.waiting:
            return []
        handle = self._scheduler.waiting[0].handle
        name = handle.request.adapter
        error = AdapterError(f"adapter {name!r}: found every slot held outside the engine")
        self._fail(handle, error)
        return [handle]

    def _forget(self, handle: Handle) -> None:
        """It is done."""
        del self._submitted[handle]
        if handle.adapter is not None:
            self.model.drop_adapter(handle.adapter.name)

    def _remove(self, sequence: Sequence, keep_prefix: bool = True) -> None:
        self._scheduler.remove(sequence, keep_prefix)
        if self._speculation is not None:
            self._speculation.forget(sequence)


def _step_limits(limits: Limits, max_step_tokens: int | None) -> Limits:
    """The artifact's, with a chunk of so many tokens."""
    most = limits.prefill_chunk_size
    if max_step_tokens is None:
        return limits
    # Each running sequence has a token in every step: so none waits for others to end.
    least = min(limits.max_batch_size, most)
    if type(max_step_tokens) is not int or not least <= max_step_tokens <= most:
        raise InputError(
            f"max_step_tokens: found {max_step_tokens!r}; accepted: {least} (max_batch_size) to "
            f"{most} (prefill_chunk_size)"
        )
    return replace(limits, prefill_chunk_size=max_step_tokens)
