"""Accuracy of a compiled toy artifact, by task.

    python examples/toy/evaluate.py dist/toy

Short prompts stay within original_max_position_embeddings, crossing ones pass it while they are
answered, long ones have passed it before. All questions are held out from training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tasks

import phi3c

KINDS = {
    "short": tasks.short_prompts,
    "crossing": tasks.crossing_prompts,
    "long": tasks.long_prompts,
}


def accuracy(engine: phi3c.Engine, prompts: Sequence[tasks.Prompt]) -> float:
    """Share of prompts whose greedy answer is exact."""
    params = phi3c.SamplingParams(temperature=0, max_tokens=24)
    handles = [engine.submit(phi3c.Request(prompt.messages(), params)) for prompt in prompts]
    while not engine.idle:
        engine.step()
    answers = [handle.outputs[0].text for handle in handles]
    right = [text == prompt.answer for text, prompt in zip(answers, prompts, strict=True)]
    return sum(right) / len(prompts)


def evaluate(model: phi3c.CompiledPhi3, count: int, seed: int) -> dict[str, dict[str, float]]:
    """task → kind → accuracy over `count` prompts."""
    engine = phi3c.Engine(model)
    return {
        task: {
            kind: accuracy(engine, prompts(task, count, seed)) for kind, prompts in KINDS.items()
        }
        for task in tasks.TASKS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--count", type=int, default=500, help="prompts per task and kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = evaluate(phi3c.load(args.artifact), args.count, args.seed)
    print(f"{'task':10}" + "".join(f"{kind:>10}" for kind in KINDS))
    for task, row in table.items():
        print(f"{task:10}" + "".join(f"{100 * row[kind]:9.1f}%" for kind in KINDS))
    print(json.dumps({"count": args.count, "seed": args.seed, "accuracy": table}))


if __name__ == "__main__":
    main()
