"""The process that compiles grammars: `python -m phi3c.engine.grammar_worker VOCABULARY LIMITS`.

xgrammar compiles in C++ that nothing can interrupt, and some short grammars take it minutes or
gigabytes. So it happens here, and the kernel ends this process when its time is up (SIGALRM) or
refuses it memory (RLIMIT_AS); grammar_compiler.py then starts another.

VOCABULARY: an open file of xgrammar's TokenizerInfo as JSON, by its number; LIMITS: as JSON.
In: a line {"kind", "texts"} per grammar. Out: a line when ready; per grammar a line {"size"} and so
many bytes of xgrammar's JSON, or a line {"error"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from typing import Any

import numpy as np
import xgrammar

_START_SECONDS = 120
_OUT_OF_MEMORY = 70  # an exit status, which grammar_compiler.py knows
_PROBE_TOKENS = 100


class _Refused(Exception):
    """Compiled, but not fit for use."""


def main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's: it closes stdin
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    answers = os.fdopen(os.dup(1), "wb")
    # What xgrammar prints are warnings that it does not follow a grammar to the letter.
    printed = tempfile.TemporaryFile()
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    limits = json.loads(sys.argv[2])
    with os.fdopen(int(sys.argv[1]), "rb") as vocabulary:
        vocabulary.seek(0)
        info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.read().decode())
    _limit_memory(limits["compile_bytes"])
    answers.write(b"ready\n")
    answers.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)  # waiting may take for ever
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, limits["compile_seconds"])
        try:
            compiled = _compile(info, **json.loads(line))
            _check_warnings(printed)
            _probe(compiled, info.vocab_size, limits["token_seconds"])
            data = compiled.serialize_json().encode()
            if len(data) > limits["compiled_bytes"]:
                raise _Refused(
                    f"found {len(data)} bytes when compiled; "
                    f"accepted: up to {limits['compiled_bytes']}"
                )
            answer = {"size": len(data)}
        except _Refused as error:
            answer, data = {"error": str(error)}, b""
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)  # nothing here can be trusted to have room now
        except Exception as error:
            if "bad_alloc" in str(error):
                os._exit(_OUT_OF_MEMORY)
            answer, data = {"error": f"found {_reason(error)}; accepted: what xgrammar can"}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n" + data)
        answers.flush()


def _compile(info: xgrammar.TokenizerInfo, kind: str, texts: list[str]) -> Any:
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    if kind == "json_schema":
        return compiler.compile_json_schema(texts[0], any_whitespace=False)
    if kind == "regex":
        return compiler.compile_regex(texts[0])
    quoted = ['"' + "".join(f"\\U{ord(char):08x}" for char in text) + '"' for text in texts]
    return compiler.compile_grammar("root ::= " + " | ".join(quoted))


def _check_warnings(printed: Any) -> None:
    printed.seek(0)
    text = printed.read().decode(errors="replace")
    printed.seek(0)
    printed.truncate()
    if "Warning:" in text:
        reason = _reason(text.split("Warning:")[1])
        raise _Refused(f"found what cannot be enforced: {reason}; accepted: what xgrammar can")


def _probe(compiled: Any, vocab_size: int, token_seconds: float) -> None:
    """A walk of random tokens: finds grammars that nothing matches, and those whose masks take
    longer with every token, as ambiguous ones do, before a request meets them."""
    matcher = xgrammar.GrammarMatcher(compiled)
    ends = set(matcher.stop_token_ids)
    bits = np.zeros((1, -(-vocab_size // 32)), np.int32)
    random = np.random.default_rng(0)
    for _ in range(_PROBE_TOKENS):
        start = time.thread_time()
        matcher.fill_next_token_bitmask(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        if not allowed.size:
            raise _Refused("found a grammar that no text completes; accepted: some text matches")
        allowed = [token for token in allowed.tolist() if token not in ends]
        if allowed:
            matcher.accept_token(allowed[random.integers(len(allowed))])
        if (took := time.thread_time() - start) > token_seconds:
            raise _Refused(
                f"found a grammar so ambiguous that one token takes {took:.2f} s; "
                f"accepted: up to {token_seconds} s"
            )
        if not allowed:
            return


def _limit_memory(more: int) -> None:
    """`more` bytes above what this process has mapped now, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))


def _reason(error: Exception | str) -> str:
    """xgrammar's message without the time and the place in its source in front of it."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    head, _, tail = reason.partition(": ")
    return (tail if head.startswith("[") and tail else reason).strip().rstrip(".")


if __name__ == "__main__":
    main()
