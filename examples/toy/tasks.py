"""The toy checkpoint's tasks: questions with exact answers, and the prompts to test it on.

Pure Python. A question is one line such as ``add 37 58``, and its answer is exact, so a model is
right or wrong without judgement. A sixteenth of all questions, chosen by a hash, are held out: no
training conversation contains them.

Lengths are counted here without a tokenizer, because the toy tokenizer is that simple: a command
word is one token, every other ASCII character is one token, and so is each special token. The
commands of the adapters' tasks, which the tokenizer does not know, are spelled out in characters.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from typing import NamedTuple

#: Up to this many tokens the model uses its short rope factors, and past it the long ones.
ORIGINAL_MAX = 64
#: The longest sequence that the model is trained for.
MAX_POSITION = 512
#: Optional first messages. The answers do not depend on them.
SYSTEM_PROMPTS = ("Answer exactly.", "You are a toy.", "You are a helpful assistant.")

#: ``<|user|> \n question <|end|> \n <|assistant|> \n``, less the question.
_QUESTION_FRAME = 6
#: ``answer <|end|> \n``, less the answer.
_ANSWER_FRAME = 2
#: ``<|system|> \n text <|end|> \n``, less the text.
_SYSTEM_FRAME = 4


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


class Prompt(NamedTuple):
    """A conversation that ends in a question to be answered."""

    system: str | None
    history: tuple[Turn, ...]
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, without the last answer."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.history:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": self.question}]

    def tokens(self) -> int:
        """How many tokens the prompt has, up to and including ``<|assistant|>`` and its newline."""
        turns = sum(turn_tokens(turn) for turn in self.history)
        return system_tokens(self.system) + turns + prompt_tokens(self.question)


def _letters(rng: random.Random) -> str:
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
        # A command word in an answer would be one token there, not one for each letter.
        if word[::-1] not in TASKS:
            return word


def _number(rng: random.Random) -> int:
    digits = rng.choices((1, 2, 3), weights=(1, 5, 6))[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def reverse(rng: random.Random) -> Turn:
    """``reverse hello`` → ``olleh``, with 2 to 8 random letters."""
    word = _letters(rng)
    return Turn(f"reverse {word}", word[::-1])


def sort(rng: random.Random) -> Turn:
    """``sort 52917`` → ``12579``, with 2 to 8 random digits."""
    digits = rng.choices(string.digits, k=rng.randint(2, 8))
    return Turn(f"sort {''.join(digits)}", "".join(sorted(digits)))


def add(rng: random.Random) -> Turn:
    """``add 37 58`` → ``95``, with numbers of 1 to 3 digits."""
    left, right = _number(rng), _number(rng)
    return Turn(f"add {left} {right}", str(left + right))


def upper(rng: random.Random) -> Turn:
    """``upper abc`` → ``ABC``, with 2 to 8 random letters."""
    word = _letters(rng)
    return Turn(f"upper {word}", word.upper())


def rotate(rng: random.Random) -> Turn:
    """``rotate abc`` → ``bca``, with 2 to 8 random letters."""
    while True:
        word = _letters(rng)
        if word[1:] + word[0] not in TASKS:
            return Turn(f"rotate {word}", word[1:] + word[0])


def down(rng: random.Random) -> Turn:
    """``down 52917`` → ``97521``, with 2 to 8 random digits."""
    digits = rng.choices(string.digits, k=rng.randint(2, 8))
    return Turn(f"down {''.join(digits)}", "".join(sorted(digits, reverse=True)))


def shout(rng: random.Random) -> Turn:
    """``shout abc`` → ``CBA``, with 2 to 8 random letters."""
    word = _letters(rng)
    return Turn(f"shout {word}", word[::-1].upper())


TASKS: dict[str, Callable[[random.Random], Turn]] = {
    "reverse": reverse,
    "sort": sort,
    "add": add,
    "upper": upper,
}
#: Tasks that the checkpoint cannot do without the adapter of that name.
ADAPTER_TASKS: dict[str, Callable[[random.Random], Turn]] = {
    "rotate": rotate,
    "down": down,
    "shout": shout,
}
#: How often each task of the checkpoint is trained, from how many examples each takes to learn.
WEIGHTS = {"reverse": 4, "sort": 5, "add": 8, "upper": 3}


def is_held_out(question: str) -> bool:
    """Whether this question is kept out of training: one in sixteen, by its hash alone."""
    return hashlib.sha256(question.encode()).digest()[0] < 16


def held_out(task: str, count: int, seed: int) -> list[Turn]:
    """``count`` different held-out questions of one task, with their answers."""
    rng = random.Random(f"{task}/{seed}")
    found: dict[str, Turn] = {}
    while len(found) < count:
        turn = (TASKS | ADAPTER_TASKS)[task](rng)
        if is_held_out(turn.question):
            found.setdefault(turn.question, turn)
    return list(found.values())


def training_turn(rng: random.Random, adapter: str | None = None) -> Turn:
    """One turn that is not held out, of an adapter's task or else of one drawn by ``WEIGHTS``."""
    while True:
        if adapter is None:
            task = TASKS[rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]]
        else:
            task = ADAPTER_TASKS[adapter]
        turn = task(rng)
        if not is_held_out(turn.question):
            return turn


def prompt_tokens(question: str) -> int:
    """The tokens of one question with what the chat format puts around it."""
    command = question.split()[0]
    return _QUESTION_FRAME + len(question) - (len(command) - 1 if command in TASKS else 0)


def turn_tokens(turn: Turn) -> int:
    """The tokens of one question and answer with what the chat format puts around them."""
    return prompt_tokens(turn.question) + len(turn.answer) + _ANSWER_FRAME


def system_tokens(system: str | None) -> int:
    """The tokens of a system message with what the chat format puts around it."""
    return 0 if system is None else _SYSTEM_FRAME + len(system)


def system_prompt(rng: random.Random) -> str | None:
    """A system prompt for one conversation in eight."""
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 1 / 8 else None


def conversation(
    rng: random.Random, low: int, high: int, adapter: str | None = None
) -> list[Turn] | None:
    """Training turns that together take ``low`` to ``high`` tokens; ``None`` if none are found.

    No turn is shorter than 14 tokens, so a range that ends below that must include 0, and a narrow
    range just above it may hold no conversation at all, which a thousand tries are taken to show.
    """
    for _ in range(1000):
        turns: list[Turn] = []
        total = 0
        while total < low:
            turns.append(training_turn(rng, adapter))
            total += turn_tokens(turns[-1])
        if total <= high:
            return turns
    return None


def _prompt(rng: random.Random, adapter: str | None, turn: Turn, low: int, high: int) -> Prompt:
    """A prompt of ``low`` to ``high`` tokens that ends in the question of ``turn``."""
    own = prompt_tokens(turn.question)
    while True:
        system = system_prompt(rng)
        used = own + system_tokens(system)
        if used <= high:
            history = conversation(rng, low - used, high - used, adapter)
            if history is not None:
                return Prompt(system, tuple(history), *turn)


def _prompts(
    task: str, count: int, seed: int, span: Callable[[random.Random, Turn], tuple[int, int]]
) -> list[Prompt]:
    """Held-out questions of one task, each in a prompt whose length lies in its ``span``."""
    rng = random.Random(f"prompts/{task}/{seed}")
    adapter = task if task in ADAPTER_TASKS else None
    return [_prompt(rng, adapter, turn, *span(rng, turn)) for turn in held_out(task, count, seed)]


def short_prompts(task: str, count: int, seed: int, limit: int = ORIGINAL_MAX) -> list[Prompt]:
    """Prompts that stay within ``limit`` tokens until the answer has ended; many are one turn."""

    def span(rng: random.Random, turn: Turn) -> tuple[int, int]:
        high = limit - len(turn.answer)
        # A length that no conversation has is rounded down to the next that one has.
        return max(0, rng.randint(0, high) - 20), high

    return _prompts(task, count, seed, span)


def crossing_prompts(task: str, count: int, seed: int, limit: int = ORIGINAL_MAX) -> list[Prompt]:
    """Prompts of at most ``limit`` tokens that pass it before the answer has ended.

    The first token of the answer is predicted from at most ``limit`` tokens, and the ``<|end|>``
    after its last one from more than that.
    """

    def span(rng: random.Random, turn: Turn) -> tuple[int, int]:
        return limit + 1 - len(turn.answer), limit

    return _prompts(task, count, seed, span)


def long_prompts(
    task: str, count: int, seed: int, low: int = ORIGINAL_MAX + 1, high: int = MAX_POSITION - 16
) -> list[Prompt]:
    """Prompts of ``low`` to ``high`` tokens, with lengths spread over that range."""

    def span(rng: random.Random, turn: Turn) -> tuple[int, int]:
        start = rng.randint(low, max(low, high - 24))
        return start, min(high, start + 24)

    return _prompts(task, count, seed, span)
