"""What the command line takes: options, their defaults and their help; cli.py does the work."""

from __future__ import annotations

import argparse
from importlib import metadata
from typing import NoReturn

from .errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Its `parse_args` leaves the command's name in `command`; raises InputError for what it does
    not understand, SystemExit for --help and --version.
    """
    parser = _Parser(prog="phi3c", description="Compiles Phi-3-family models and runs them.")
    parser.add_argument("--version", action="version", version=f"phi3c {metadata.version('phi3c')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        made.add_argument("--json", action="store_true", help="print JSON, for programs")
        made.add_argument("--quiet", action="store_true", help="no progress bars")
        made.add_argument("--verbose", action="store_true", help="tracebacks of errors")
        return made

    made = command("compile", "compile a checkpoint into an artifact folder")
    made.add_argument(
        "source",
        help="checkpoint folder, .gguf file, repo id, config .json (random weights), or what "
        "`convert` made",
    )
    made.add_argument("-o", "--output", required=True, metavar="DIR")
    _add_compile_options(made)
    made.add_argument(
        "--merge-adapter",
        metavar="PATH",
        help="LoRA adapter (folder, repo id) to add to the weights",
    )
    made.add_argument("--seed", type=_seed, help="of random weights (0)")

    made = command("convert", "convert weights alone, to compile from later")
    made.add_argument("source", help="checkpoint folder, .gguf file, repo id, or config .json")
    made.add_argument("-o", "--output", required=True, metavar="DIR")
    made.add_argument("--quantization", metavar="SCHEME", help="weight scheme (q4f16_1)")
    made.add_argument("--target", help="whose kernels will read them (cpu)")
    made.add_argument("--seed", type=_seed, help="of random weights (0)")

    made = command("generate", "answer one prompt")
    prompt = made.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="- is stdin")
    made.add_argument("--raw", action="store_true", help="no chat template")
    made.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="answer with a LoRA adapter of PEFT's (folder or repo id); repeatable, an answer each",
    )
    answer = made.add_argument_group("grammar (pip install 'phi3c[grammar]')")
    answer.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that follows it")
    answer.add_argument("--regex", metavar="RE", help="the whole answer matches it")
    answer.add_argument("--choice", action="append", default=[], metavar="TEXT", help="repeatable")
    _add_model_options(made)

    made = command("chat", "answer line by line; /reset forgets, /exit ends")
    _add_model_options(made)

    made = command("inspect", "tell what an artifact holds and needs")
    made.add_argument("artifact", help="artifact folder")
    made.add_argument("--max-total-seq-len", type=int, metavar="N", help="KV bytes for N tokens")

    made = command("link", "link an artifact that was compiled where no linker was found")
    made.add_argument("artifact", help="artifact folder")

    command("targets", "what this installation can compile for and run on")

    made = command("bench", "time an artifact, beside what this machine can do at best")
    made.add_argument("artifact", help="artifact folder")
    for name, default, what in (
        ("--prefill", "128,512", "tokens of prompts"),
        ("--decode", "128,1024", "contexts of one sequence that decodes"),
        ("--batch-decode", "128", "contexts of --batch sequences that decode together"),
    ):
        text = f"{what} ({default}; empty: none)"
        made.add_argument(name, type=_numbers, metavar="N,…", help=text)
    made.add_argument("--batch", type=int, default=8, metavar="N", help="sequences (8)")
    made.add_argument("--samples", type=int, default=7, metavar="N", help="runs of each (7)")
    _add_device_options(made)
    made.add_argument("--profile", action="store_true", help="the time by kernel as well")
    made.add_argument(
        "--engine",
        action="store_true",
        help="run the engine instead: --batch requests together, a shared prefix, a trace",
    )
    made.add_argument("--requests", type=int, default=32, metavar="N", help="of the trace (32)")
    made.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="arrivals a second (0: all at once; without: that, then 70 %% of what it answers)",
    )
    made.add_argument(
        "--shared-prefix", type=int, default=64, metavar="N", help="tokens of every third (64)"
    )
    made.add_argument(
        "--longest", type=int, default=512, metavar="N", help="tokens of prompt and answer (512)"
    )
    made.add_argument(
        "--max-step-tokens",
        type=int,
        metavar="N",
        help="of the trace (prefill_chunk_size)",
    )

    made = command("verify", "compare an artifact with its checkpoint, or its files")
    made.add_argument("artifact", help="artifact folder (or converted weights, with --integrity)")
    made.add_argument(
        "--against", metavar="CHECKPOINT", help="its logits at every boundary: a folder or repo id"
    )
    made.add_argument(
        "--integrity", action="store_true", help="every file is what was written (sha256)"
    )
    made.add_argument("--oracle", help="transformers or numpy (transformers if installed)")
    _add_device_options(made)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: 0 and up")
    return int(text)


def _numbers(text: str) -> list[int]:
    """`128,512` → [128, 512]; nothing → []."""
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: numbers such as 128,512")
    return [int(part) for part in parts]


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (physical cores)")
    parser.add_argument("--device", help="one that `phi3c targets` lists (the target's first)")


def _add_compile_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compilation (defaults in brackets)")
    group.add_argument(
        "--target", help="cpu[:<mcpu>[:<triple>]], cuda[:<arch>], vulkan[:<index>], metal (cpu)"
    )
    group.add_argument("--quantization", metavar="SCHEME", help="weight scheme (q4f16_1)")
    group.add_argument("--max-batch-size", type=int, metavar="N", help="sequences at a time (8)")
    group.add_argument("--context-length", type=int, metavar="N", help="tokens (at most 4096)")
    group.add_argument("--prefill-chunk-size", type=int, metavar="N", help="tokens (512)")
    group.add_argument("--max-loras", type=int, metavar="N", help="slots for LoRA adapters (0)")
    group.add_argument("--max-rank", type=int, metavar="R", help="of an adapter: 8 to 128 (16)")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="artifact, or checkpoint folder or repo id to compile")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    _add_device_options(parser)
    parser.add_argument("--cache-dir", metavar="DIR", help="of artifacts (~/.cache/phi3c)")
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="(until the context is full)")
    group.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K", help="0: off")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, metavar="S", help="(fresh randomness)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument("--ignore-eos", action="store_true")
    group = parser.add_argument_group("speculation (the same answers, sooner if guesses are right)")
    guesses = group.add_mutually_exclusive_group()
    guesses.add_argument("--prompt-lookup", action="store_true", help="guess by the text so far")
    guesses.add_argument("--draft", metavar="ARTIFACT", help="guess by a small model")
    _add_compile_options(parser)
