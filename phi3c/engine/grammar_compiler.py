"""Grammars to masks: one process that compiles (grammar_worker.py), and a cache of what it made.

xgrammar is imported when the first grammar comes. It needs torch and transformers to be imported
itself; nothing here uses them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict
from dataclasses import asdict
from typing import IO, Any

from phi3c.engine.ascii_regex import ascii_regex
from phi3c.engine.chat_template import one_line
from phi3c.engine.grammar import Grammar, GrammarLimits
from phi3c.engine.grammar_state import CompiledGrammar
from phi3c.engine.grammar_vocabulary import GrammarVocabulary
from phi3c.engine.json_schema import enforceable_schema
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import InputError

__all__ = ["GrammarCompiler"]

_OUT_OF_MEMORY = 70  # the worker's exit status then


class GrammarCompiler:
    """Of one tokenizer and vocabulary. Threads may share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        limits: GrammarLimits,
    ) -> None:
        """vocab_size: of the model's logits; ids that the tokenizer lacks are never allowed.
        Starts nothing yet."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(token for token in eos_token_ids if token < vocab_size)
        self._limits = limits
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._compile_lock = threading.Lock()
        self._info: Any = None
        self._vocabulary: GrammarVocabulary | None = None
        self._vocabulary_file: IO[bytes] | None = None
        self._worker: subprocess.Popen | None = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar's masks; a cached one does not wait for others that are compiled.

        Raises InputError: it is beyond a limit, broken, or asks for what cannot be enforced.
        """
        grammar.check(self._limits)
        if (compiled := self._cached(grammar)) is not None:
            return compiled
        texts = grammar.texts
        if grammar.kind == "json_schema":
            texts = (enforceable_schema(texts[0]),)
        elif grammar.kind == "regex":
            texts = (ascii_regex(texts[0]),)
        with self._compile_lock:
            compiled = self._cached(grammar)  # it may have come while this call waited
            if compiled is None:
                compiled = self._compile(grammar.kind, texts)
                self._keep(grammar, compiled)
        return compiled

    @property
    def cached(self) -> list[Grammar]:
        """Grammars that need no compiling, the last used one last."""
        with self._cache_lock:
            return list(self._cache)

    def _cached(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._cache_lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
            return self._cache.get(grammar)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        with self._cache_lock:
            self._cache[grammar] = compiled
            memory = sum(each.memory_bytes for each in self._cache.values())
            while len(self._cache) > self._limits.cached or memory > self._limits.cached_bytes:
                memory -= self._cache.popitem(last=False)[1].memory_bytes

    def _compile(self, kind: str, texts: tuple[str, ...]) -> CompiledGrammar:
        xgrammar = _import_xgrammar()
        if self._info is None:
            self._read_tokenizer(xgrammar)
        if self._worker is not None and self._ready and self._worker.poll() is not None:
            self._stop()  # ended by somebody else, while it had nothing to do
        if self._worker is None:
            self._start()
        worker = self._worker
        if not self._ready and worker.stdout.readline() != b"ready\n":
            self._stop()
            raise RuntimeError("the process that compiles grammars did not start")
        self._ready = True
        try:
            answer, data = _ask(worker, {"kind": kind, "texts": texts})
        except BaseException:  # Ctrl-C: the next grammar must not get this one's answer
            self._end()
            raise
        if answer is None:
            ended = self._stop()
            self._start()  # it imports xgrammar while nobody waits for it
            raise InputError(f"{kind}: {self._why(ended)}")
        if "error" in answer:
            raise InputError(f"{kind}: {answer['error']}")
        matches = xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._info)
        return CompiledGrammar(matches, self._vocabulary, self._limits.token_seconds)

    def _why(self, ended: int) -> str:
        """ended: the worker's exit status."""
        if ended == -signal.SIGALRM:
            seconds = self._limits.compile_seconds
            return f"found a grammar that takes more than {seconds} s to compile; accepted: less"
        if ended == _OUT_OF_MEMORY:
            megabytes = self._limits.compile_bytes >> 20
            return (
                f"found a grammar that takes more than {megabytes} MiB to compile; accepted: less"
            )
        return f"found a grammar that ends its compiler (status {ended}); accepted: others"

    def _read_tokenizer(self, xgrammar: Any) -> None:
        """Tokens are given as the bytes they add to the text, whatever the tokenizer's style."""
        tokenizer = self._tokenizer
        pieces = [
            b"" if token_id in self._ends else tokenizer.token_bytes(token_id)
            for token_id in range(self._vocab_size)
        ]
        first = {
            token_id: alone
            for token_id, piece in enumerate(pieces)
            if piece.startswith(b" ") and (alone := tokenizer.first_token_bytes(token_id)) != piece
        }
        self._vocabulary = GrammarVocabulary(pieces, first)
        self._info = xgrammar.TokenizerInfo(
            pieces,
            xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=self._ends,
        )
        # A file, as a pipe would keep the writer waiting until the worker has started.
        self._vocabulary_file = tempfile.TemporaryFile()
        self._vocabulary_file.write(self._info.serialize_json().encode())
        self._vocabulary_file.flush()

    def _start(self) -> None:
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        vocabulary = self._vocabulary_file.fileno()
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "phi3c.engine.grammar_worker", str(vocabulary)]
            + [json.dumps(asdict(self._limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(vocabulary,),
            env=os.environ | single | path,
        )
        self._ready = False
        self._finalizer = weakref.finalize(self, _end, self._worker)

    def _stop(self) -> int:
        """The worker's exit status. It has closed its output, or is ended here."""
        worker, self._worker = self._worker, None
        try:
            worker.wait(timeout=1)  # its own status tells why it ended
        except subprocess.TimeoutExpired:
            pass
        self._finalizer()
        return worker.returncode

    def _end(self) -> None:
        self._worker = None
        self._finalizer()


def _ask(worker: subprocess.Popen, request: dict[str, Any]) -> tuple[dict[str, Any] | None, bytes]:
    """Its answer and the bytes behind it; None if it has ended."""
    try:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
    except OSError:
        return None, b""
    line = worker.stdout.readline()
    if not line.endswith(b"\n"):
        return None, b""
    answer = json.loads(line)
    size = answer.get("size", 0)
    data = worker.stdout.read(size)
    return (answer, data) if len(data) == size else (None, b"")


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:  # what it never read
        pass


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise InputError(
            f"grammar: needs xgrammar ({one_line(error)}); pip install 'phi3c[grammar]'"
        ) from None
    return xgrammar
