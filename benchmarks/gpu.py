"""Builds, checks and times a model on a GPU, beside the floor that the card's rates set.

    python benchmarks/gpu.py configs/phi-3-mini-4k.json                        # an NVIDIA GPU
    python benchmarks/gpu.py configs/tiny.json --target vulkan --context 64 --prefill 128

For each scheme: how long it took to compile; the largest difference of every function's output
from the CPU's, on two layers, and of a prompt at once from the same prompt in chunks of 16; then,
of the whole model, a prompt's prefill, a decode step of each batch size, and where their time went,
kernel by kernel. The floor of a decode step is the bytes of weights, keys and values that it reads
over the card's bandwidth; of a prefill, its operations over the rate of float16 matrix products.
The peer, transformers with torch, runs on the same weights where it can. Weights are random for a
config. Medians; in brackets the quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tvm
from card_rates import CardRates, card_rates, seconds_of
from function_parity import parity
from torch_peer import Step, TorchPeer

import phi3c
from phi3c.errors import Phi3CError
from phi3c.manifest import Manifest
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.kv_cache import PagedKVCache
from phi3c.sources import resolve_source
from phi3c.tensor_file import tensor_bytes
from phi3c.vulkan import devices

ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="config .json or checkpoint folder")
    parser.add_argument("--target", default="cuda:native")
    parser.add_argument("--schemes", nargs="+", default=["q0f16", "q4f16_1"], metavar="SCHEME")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    parser.add_argument("--context", nargs="+", type=int, default=[128, 2048], metavar="TOKENS")
    parser.add_argument("--prefill", nargs="+", type=int, default=[512, 2048], metavar="TOKENS")
    parser.add_argument("--peer", default="cuda", choices=["cuda", "cpu", "none"])
    parser.add_argument("--artifacts", type=Path, help="keep what was compiled, and use it again")
    parser.add_argument("--no-check", action="store_true", help="only the times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, args.artifacts or Path(folder))))


def run(args: argparse.Namespace, folder: Path) -> dict:
    facts: dict = {"target": args.target, "schemes": {}}
    rates = None
    for scheme in args.schemes:
        found = facts["schemes"][scheme] = {}
        model, found["compile_seconds"] = compiled(args, scheme, folder / scheme)
        if rates is None:
            rates = measured(args.target)
            facts["rates"] = vars(rates)
        print(f"\n{scheme}: compiled in {found['compile_seconds']:.1f} s")
        if not args.no_check:
            found["parity"] = checked(args, scheme, folder)
            found["chunks"] = in_chunks(model, max(args.prefill))
        found["times"] = times(args, model, rates)
        print(json.dumps({scheme: found}), flush=True)  # should the machine be taken away
        del model
    if args.peer != "none":
        facts["peer"] = peer_times(args)
    return facts


def measured(target: str) -> CardRates:
    """Of the first device of the target's kind."""
    kind = target.split(":")[0]
    most = devices()[0].max_storage_buffer_range if kind == "vulkan" else 2**31
    rates = card_rates(tvm.device(kind, 0), most)
    matrix = "not measured" if rates.matrix is None else f"{rates.matrix / 1e12:.0f} TFLOP/s"
    print(f"copies {rates.bandwidth / 1e9:,.0f} GB/s, float16 matrix products {matrix}")
    return rates


def compiled(args: argparse.Namespace, scheme: str, folder: Path) -> tuple[CompiledPhi3, float]:
    """The whole model on the device, and the seconds that compiling took (0: it was there)."""
    start = time.perf_counter()
    if not folder.exists():
        phi3c.compile(
            args.model,
            args.target,
            scheme,
            folder,
            max_batch_size=max(args.batch),
            context_length=max(*args.context, *args.prefill) + 64,
            prefill_chunk_size=max(*args.prefill, *args.batch),
        )
    seconds = time.perf_counter() - start
    return phi3c.load(folder), seconds


def checked(args: argparse.Namespace, scheme: str, folder: Path) -> dict[str, float]:
    """Every function of two layers, against the CPU."""
    config = resolve_source(args.model).config.to_dict() | {"num_hidden_layers": 2}
    small = folder / "two-layers.json"
    small.write_text(json.dumps(config))
    limits = dict(max_batch_size=4, context_length=256, prefill_chunk_size=64)
    on_cpu = scheme if scheme.startswith("q0") else f"{scheme}:float"
    for target, name, where in ((args.target, scheme, "there"), ("cpu", on_cpu, "here")):
        phi3c.compile(small, target, name, folder / f"{scheme}-{where}", **limits)
    return parity(*(phi3c.load(folder / f"{scheme}-{where}") for where in ("there", "here")))


def in_chunks(model: CompiledPhi3, tokens: int) -> float:
    """Largest difference / largest logit of a prompt's last token between a forward of all tokens
    and forwards of 16, which other kernels compute."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    found = []
    for chunk in (tokens, 16):
        cache = model.create_paged_kv_cache(max_batch_size=1, max_total_seq_len=_pages(tokens))
        cache.add_sequence(0, max_length=tokens)
        for start in range(0, tokens, chunk):
            part = ids[start : start + chunk]
            with cache.forward([0], [len(part)]):
                logits = model.prefill(model.embed(part), cache)[0]
        found.append(logits.numpy().astype(np.float64))
    error = float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())
    print(f"{f'{tokens} tokens at once and in chunks of 16':40}{error:10.1e}")
    return error


def times(args: argparse.Namespace, model: CompiledPhi3, rates: CardRates) -> dict:
    found: dict = {}
    for tokens in args.prefill:
        name = f"prefill {tokens}"
        floor = rates.seconds(*prefill_work(model.manifest, tokens))
        found[name] = timed(name, prefill(model, tokens), floor, tokens)
        found[name]["kernels"] = kernels(model, prefill(model, tokens))
    for context in args.context:
        for batch in args.batch:
            name = f"decode, batch {batch}, context {context}"
            floor = rates.seconds(decode_bytes(model.manifest, batch, context))
            found[name] = timed(name, decode(model, batch, context), floor, batch)
            if batch in (1, max(args.batch)):
                found[name]["kernels"] = kernels(model, decode(model, batch, context))
    if (graphs := model.decode_graphs) is not None:
        found["graphs"] = {"captures": graphs.captures, "failure": graphs.failure}
        print(f"CUDA graphs: {graphs.captures} captured; failure: {graphs.failure}")
    return found


def prefill(model: CompiledPhi3, tokens: int) -> Step:
    """The greedy token after so many of one sequence."""
    cache = model.create_paged_kv_cache(max_batch_size=1, max_total_seq_len=_pages(tokens))
    ids = np.full(tokens, 5)

    def step() -> None:
        cache.add_sequence(0, max_length=tokens)
        with cache.forward([0], [tokens]):
            logits = model.prefill(model.embed(ids), cache)[0]
        model.logit_rows(logits, [False])[0].argmax()
        cache.remove_sequence(0)

    return step


def decode(model: CompiledPhi3, batch: int, context: int) -> Step:
    """The greedy token of each sequence after one more, which is then taken back."""
    cache = filled(model, batch, context)
    ids = np.full(batch, 5)
    run = model.decode if batch == 1 else model.batch_decode
    every = list(range(batch))

    def step() -> None:
        with cache.forward(every, [1] * batch):
            logits = run(model.embed(ids), cache)[0]
        for row in model.logit_rows(logits, [False] * batch):
            row.argmax()
        for sequence in every:
            cache.popn(sequence, 1)

    return step


def filled(model: CompiledPhi3, batch: int, context: int) -> PagedKVCache:
    room = batch * _pages(context + 1)
    cache = model.create_paged_kv_cache(max_batch_size=batch, max_total_seq_len=room)
    for sequence in range(batch):
        cache.add_sequence(sequence, max_length=context + 1)
        with cache.forward([sequence], [context]):
            model.prefill(model.embed(np.arange(context) % 100 + 3), cache)
    return cache


def _pages(tokens: int) -> int:
    return -(-tokens // 16) * 16


def prefill_work(manifest: Manifest, tokens: int) -> tuple[float, float]:
    """(bytes, operations): weights once; products of all tokens, and each with those before it."""
    config = manifest.config
    head = config.vocab_size * config.hidden_size
    weights = sum(np.prod(shape) for shape in linear_shapes(manifest)) * config.num_hidden_layers
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return weight_bytes(manifest), float(2 * tokens * weights + 2 * head + attention)


def linear_shapes(manifest: Manifest) -> list[tuple[int, int]]:
    """Of a layer."""
    c = manifest.config
    heads = c.num_attention_heads * c.head_dim
    return [
        (heads + 2 * c.num_key_value_heads * c.head_dim, c.hidden_size),
        (c.hidden_size, heads),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    ]


def weight_bytes(manifest: Manifest) -> int:
    """All but the embedding, of which a few rows are read (unless it is the head too)."""
    tied = manifest.config.tie_word_embeddings
    return sum(
        tensor_bytes(info.shape, info.dtype)
        for info in manifest.parameters
        if tied or not info.name.startswith("model.embed_tokens")
    )


def decode_bytes(manifest: Manifest, batch: int, context: int) -> float:
    return weight_bytes(manifest) + batch * context * manifest.kv_layout.bytes_per_token


def timed(name: str, step: Step, floor: float | None, tokens: int) -> dict:
    seconds = seconds_of(step, ROUNDS)
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    text = f"{name:32}{median * 1e3:9.3f} ms ({low * 1e3:.3f}–{high * 1e3:.3f}) "
    text += f"{tokens / median:10,.0f} tokens/s"
    if floor is not None:
        text += f"   floor {floor * 1e3:.3f} ms: {floor / median:.0%} of it"
    print(text, flush=True)
    return {"seconds": median, "quartiles": [low, high], "floor": floor}


def kernels(model: CompiledPhi3, step: Step, rows: int = 6) -> dict[str, float]:
    """Name → seconds on the device in one step; those that take longest are printed."""
    step()
    with model.kernel_times() as spent:
        step()
    seconds = {name: one.seconds for name, one in spent.items()}
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:rows]:
        print(f"    {name:44}{spent[name].count:6} ×{seconds[name] * 1e3:10.3f} ms")
    return seconds


def peer_times(args: argparse.Namespace) -> dict | str:
    source = resolve_source(args.model)
    try:
        peer = TorchPeer(source.config, source.weights(), args.peer)
    except (ImportError, RuntimeError) as error:
        print(f"\ntransformers with torch: not run: {error}")
        return str(error)
    print("\ntransformers with torch, float16")
    found = {}
    for tokens in args.prefill:
        found[f"prefill {tokens}"] = timed(f"prefill {tokens}", peer.prefill(tokens), None, tokens)
    for context in args.context:
        for batch in args.batch:
            name = f"decode, batch {batch}, context {context}"
            found[name] = timed(name, peer.decode(batch, context), None, batch)
    return found


if __name__ == "__main__":
    try:
        main()
    except Phi3CError as error:
        raise SystemExit(f"gpu.py: {error}") from None
