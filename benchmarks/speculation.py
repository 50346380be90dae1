"""What speculation gains and costs: tokens/s with and without it, of texts that repeat or do not.

    python benchmarks/speculation.py ARTIFACT [--draft ARTIFACT] [--batch 1] [--tokens 128]

Answers are samples out of an alphabet of a few random tokens (a bias puts them first and top_k
forbids all others, so any weights will do): out of one, every guess of a prompt lookup is right;
out of many, hardly any is; "all" is the whole vocabulary, where nothing ever matches. A draft model
guesses the answers of the whole vocabulary, greedily and sampled at temperature 1; without --draft
the artifact is its own, which shows how often guesses are right, not a gain. With and without take
turns, and give the same tokens but for near ties (phi3c/engine/speculation.py). The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median

import numpy as np

import phi3c
from phi3c.engine.engine import Engine
from phi3c.engine.speculation import SpeculationOptions

ALPHABETS = [1, 2, 4, 16, 64, None]
_FLAT = dict(temperature=8.0)  # all of an alphabet about as likely
_BIAS = 100.0


@dataclass(frozen=True)
class Run:
    """Of one batch, its prompts left out."""

    tokens_per_second: float
    drafted: int
    accepted: int
    answers: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--draft", help="artifact of a draft model; by default the same")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reproducible", action="store_true", help="in both, see Engine")
    args = parser.parse_args()
    model = phi3c.load(args.artifact, threads=args.threads)
    draft = phi3c.load(args.draft, threads=args.threads) if args.draft else model
    rows = []
    for adaptive in (True, False):
        for alphabet in ALPHABETS:
            options = phi3c.PromptLookup(adaptive=adaptive)
            params = sampling(model, alphabet)
            name = f"lookup, {alphabet or 'all'} tokens"
            rows.append(measure(model, name, options, params, args))
        for width in (1, 3):
            for name, params in (
                ("greedy", dict(temperature=0)),
                ("sampled", dict(temperature=1.0)),
            ):
                options = phi3c.DraftModel(draft, width=width, adaptive=adaptive)
                name = f"draft model, width {width}, {name}"
                rows.append(measure(model, name, options, params, args))
    print(
        json.dumps(
            {"artifact": args.artifact, "draft": args.draft, "batch": args.batch}
            | {"context": args.context, "tokens": args.tokens, "rows": rows}
        )
    )


def sampling(model: phi3c.CompiledPhi3, alphabet: int | None) -> dict:
    """Parameters that draw from so many tokens of the vocabulary."""
    if alphabet is None:
        return _FLAT
    tokens = np.random.default_rng(0).choice(model.config.vocab_size, alphabet, replace=False)
    bias = {int(token): _BIAS for token in tokens}
    return _FLAT | {"logit_bias": bias, "top_k": alphabet}


def measure(
    model: phi3c.CompiledPhi3,
    name: str,
    options: SpeculationOptions,
    params: dict,
    args: argparse.Namespace,
) -> dict:
    """Medians of alternating runs, printed as a row of the table."""
    with_, without = [], []
    for seed in range(args.rounds):
        without.append(run(model, None, params, seed, args))
        with_.append(run(model, options, params, seed, args))
    ratios = [
        a.tokens_per_second / b.tokens_per_second for a, b in zip(with_, without, strict=True)
    ]
    drafted, accepted = (sum(getattr(r, n) for r in with_) for n in ("drafted", "accepted"))
    row = {
        "name": name,
        "adaptive": options.adaptive,
        "without": round(median(r.tokens_per_second for r in without), 2),
        "with": round(median(r.tokens_per_second for r in with_), 2),
        "ratio": round(median(ratios), 3),
        "drafted": drafted,
        "accepted": accepted,
        "accepted_share": round(accepted / drafted, 3) if drafted else None,
        "same_tokens": all(a.answers == b.answers for a, b in zip(with_, without, strict=True)),
    }
    if not _printed:
        print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    _printed.append(name)
    print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    return row


_printed: list[str] = []


def run(
    model: phi3c.CompiledPhi3,
    options: SpeculationOptions | None,
    params: dict,
    seed: int,
    args: argparse.Namespace,
) -> Run:
    room = args.batch * (-(-(args.context + args.tokens) // 16) + 1) * 16
    engine = Engine(
        model,
        max_total_seq_len=room,
        prefix_cache=False,
        speculation=options,
        reproducible=args.reproducible,
    )
    rng = np.random.default_rng(seed)
    handles = []
    for i in range(args.batch):
        prompt = rng.integers(3, model.config.vocab_size, args.context).tolist()
        limits = dict(max_tokens=args.tokens, ignore_eos=True, seed=seed * args.batch + i)
        handles.append(
            engine.submit(phi3c.Request(prompt, phi3c.SamplingParams(**limits | params)))
        )
    while not all(handle.outputs[0].token_ids for handle in handles):
        engine.step()
    before = vars(engine.metrics()).copy()
    while not engine.idle:
        engine.step()
    after = engine.metrics()
    tokens = after.generated_tokens - before["generated_tokens"]
    return Run(
        tokens / (after.step_seconds - before["step_seconds"]),
        after.drafted_tokens,
        after.accepted_tokens,
        [handle.outputs[0].token_ids for handle in handles],
    )


if __name__ == "__main__":
    main()
