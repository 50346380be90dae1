"""The command line: `phi3c compile | convert | generate | chat | inspect | bench | verify`.

One function per command; each imports what it needs, so that `--help` is fast. Exit codes: 0 done,
1 failed (this system cannot do it now, `verify` found wrong logits, a bug), 2 refused (a mistake in
what was asked, a file that is not what it should be), 130 interrupted, 143 terminated.
Errors are one line on stderr; --verbose puts the traceback before it. This is the only module that
reads the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .arguments import build_parser
from .errors import ContextLengthError, InputError, Phi3CError

if TYPE_CHECKING:
    from .config import Phi3Config
    from .converter import Progress
    from .engine.answer import Answer
    from .engine.engine import Engine
    from .engine.sampler import SamplingParams
    from .engine.tokenizer import Tokenizer
    from .runtime.compiled import CompiledPhi3

_COMPILE_OPTIONS = (
    "target",
    "quantization",
    "max_batch_size",
    "context_length",
    "prefill_chunk_size",
    "max_loras",
    "max_rank",
)
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    verbose = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        args = build_parser().parse_args(argv)
        verbose = args.verbose
        if args.json or args.quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before the library reads it
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without the answer's letters
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except SystemExit as done:  # argparse has shown the help or the version, or SIGTERM came
        return done.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except Exception as error:
        if verbose:
            traceback.print_exc()
        _print_error(error)
        return 2 if isinstance(error, Phi3CError) and isinstance(error, ValueError) else 1


def _terminate(signum: int, frame: object) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that nothing half-written stays."""
    raise SystemExit(128 + signum)


# Commands


def _compile(args: argparse.Namespace) -> int:
    from .compiler import compile
    from .describe import human_size

    if args.max_rank is not None and not args.max_loras:
        raise InputError(
            f"--max-rank: found {args.max_rank}; accepted: with --max-loras, the number of slots"
        )
    start = time.perf_counter()
    options = _given(args, (*_COMPILE_OPTIONS, "merge_adapter", "seed")) | _converted_scheme(args)
    with _progress(args) as progress:
        artifact = compile(args.source, output=args.output, progress=progress, **options)
    seconds = time.perf_counter() - start
    size = _folder_size(artifact.path)
    manifest = artifact.manifest
    if args.json:
        facts = {
            "path": str(artifact.path),
            "quantization": manifest.quantization,
            "target": manifest.target.name,
            "mcpu": manifest.target.mcpu,
            "limits": asdict(manifest.limits),
            "adapters": None if manifest.adapters is None else asdict(manifest.adapters),
            "linked": artifact.linked,
            "bytes": size,
            "seconds": seconds,
        }
        print(json.dumps(facts))
    elif not args.quiet:
        what = f"{manifest.quantization} for {manifest.target.name} ({manifest.target.mcpu})"
        print(f"{artifact.path}: {what}, {human_size(size)} in {seconds:.1f} s")
        if not artifact.linked:
            print(
                f"{artifact.library}: not linked yet: run `phi3c link {artifact.path}` on a Mac "
                "with Xcode's command line tools, or here after `pip install ziglang`"
            )
    return 0


def _link(args: argparse.Namespace) -> int:
    from .link import link

    artifact = link(Path(args.artifact).expanduser())
    if args.json:
        print(json.dumps({"path": str(artifact.path), "library": str(artifact.library)}))
    elif not args.quiet:
        print(f"{artifact.library}: linked for {artifact.manifest.target.mtriple}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .converter import convert
    from .describe import human_size

    start = time.perf_counter()
    options = _given(args, ("quantization", "target", "seed"))
    with _progress(args) as progress:
        converted = convert(args.source, output=args.output, progress=progress, **options)
    seconds = time.perf_counter() - start
    size = _folder_size(converted.path)
    name = converted.manifest.quantization
    if args.json:
        facts = {"path": str(converted.path), "quantization": name}
        print(json.dumps(facts | {"bytes": size, "seconds": seconds}))
    elif not args.quiet:
        print(f"{converted.path}: {name}, {human_size(size)} in {seconds:.1f} s")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .engine.answer import answers_together
    from .engine.grammar import grammar_from_options
    from .engine.request import Request
    from .engine.tokenizer import Tokenizer

    # What can be wrong is looked at before a checkpoint is compiled.
    text = _prompt_text(args)
    grammar = grammar_from_options(args.json_schema, args.regex, args.choice)
    adapters = _adapters(args)
    folder = _model_folder(args, adapters)
    tokenizer = Tokenizer.from_folder(folder)
    params = _sampling_params(args, folder)
    request = Request(_prompt_ids(args, tokenizer, text), params, grammar=grammar)
    engine = _engine(args, folder, tokenizer, max(1, len(adapters)))
    for name, path in adapters.items():
        engine.model.load_adapter(path, name)
    failed: Phi3CError | None = None
    requests = [replace(request, adapter=name) for name in adapters or [None]]
    for answer in answers_together(engine, requests):
        name = answer.handle.request.adapter
        if len(adapters) > 1 and not args.json:
            print(f"{name}: ", end="")
        try:
            _show(answer, args.json)
        except Phi3CError as error:  # after the others
            failed = failed or error
    if failed is not None:
        raise failed
    return 0


def _chat(args: argparse.Namespace) -> int:
    """Answers line by line. A turn that cannot be answered is dropped, and the exit code is 2."""
    from .engine.answer import Answer
    from .engine.request import Request
    from .engine.tokenizer import Tokenizer

    folder = _model_folder(args)
    tokenizer = Tokenizer.from_folder(folder)
    if not tokenizer.has_chat_template:
        raise InputError(f"{folder}: no chat template; accepted: `phi3c generate --raw`")
    params = _sampling_params(args, folder)
    engine = _engine(args, folder, tokenizer)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages, code = list(system), 0
    while (line := _next_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(system)
        if line == "/reset" or not line.strip():
            continue
        question = {"role": "user", "content": line}
        try:
            answer = Answer(engine, Request([*messages, question], params))
        except (ContextLengthError, InputError) as error:
            _print_error(error)
            code = 2
            continue
        with contextlib.suppress(KeyboardInterrupt):  # stops this answer, not the chat
            _show(answer, args.json)
        if answer.output.token_ids:
            messages += [question, {"role": "assistant", "content": answer.output.text}]
    return code


def _inspect(args: argparse.Namespace) -> int:
    from .artifact import Artifact
    from .describe import artifact_facts, render
    from .memory import default_cache_tokens

    artifact = Artifact.open(Path(args.artifact).expanduser())
    tokens = args.max_total_seq_len
    if tokens is None:
        tokens = default_cache_tokens(artifact.manifest.limits)
    if tokens < 1:
        raise InputError(f"--max-total-seq-len: found {tokens}; accepted: 1 or more")
    facts = artifact_facts(artifact, tokens)
    print(json.dumps(facts) if args.json else render(facts))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .describe import human_size, render_report
    from .verify import check_integrity, verify

    if args.against is None and not args.integrity:
        raise InputError("verify: found neither --against nor --integrity; accepted: one or both")
    if args.integrity:
        summed = check_integrity(Path(args.artifact).expanduser())
        if args.against is None or not args.json:
            text = f"{summed.path}: every file is what was written: {summed.files} files, "
            text += human_size(summed.bytes)
            print(json.dumps(asdict(summed)) if args.json else text)
    if args.against is None:
        return 0
    with _progress(args) as progress:
        report = verify(
            Path(args.artifact).expanduser(),
            args.against,
            oracle=args.oracle,
            device=args.device,
            threads=args.threads,
            progress=progress,
        )
    print(json.dumps(asdict(report) | {"ok": report.ok}) if args.json else render_report(report))
    return 0 if report.ok else 1


def _targets(args: argparse.Namespace) -> int:
    from .describe import render_readiness
    from .readiness import readiness

    found = readiness()
    if args.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        print(render_readiness(found))
    return 0


def _converted_scheme(args: argparse.Namespace) -> dict[str, str]:
    """The scheme of weights that are converted already, unless one was asked for."""
    from .artifact import WEIGHTS_MANIFEST, ConvertedWeights, manifest_name

    folder = Path(args.source).expanduser()
    if args.quantization is not None or manifest_name(folder) != WEIGHTS_MANIFEST:
        return {}
    return {"quantization": ConvertedWeights.open(folder).manifest.quantization}


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _bench(args: argparse.Namespace) -> int:
    from .bench.report import bench, facts, render
    from .bench.workloads import Work, fits
    from .runtime.compiled import load

    asked = [n for given in (args.prefill, args.decode, args.batch_decode) for n in given or ()]
    if min([args.samples, args.batch, *asked]) < 1:
        raise InputError("bench: found a number below 1; accepted: positive numbers")
    model = load(Path(args.artifact).expanduser(), args.device, args.threads)
    if args.engine:
        return _bench_engine(args, model)
    works = []
    for given, default, made in (
        (args.prefill, (128, 512), lambda n: Work(1, 0, n)),
        (args.decode, (128, 1024), lambda n: Work(1, n, 1)),
        (args.batch_decode, (128,), lambda n: Work(args.batch, n, 1)),
    ):
        if given is None:  # what the artifact has room for
            works += [w for w in map(made, default) if fits(model.manifest, w, args.samples)]
        else:
            works += map(made, given)
    with _progress(args) as progress:
        report = bench(model, works, args.samples, args.profile, progress)
    if not args.json:
        print(render(report))
    print(json.dumps(facts(report)))
    return 0


def _bench_engine(args: argparse.Namespace, model: CompiledPhi3) -> int:
    from .bench.engine_loads import bench_engine, render
    from .bench.machine import Others

    others = Others()
    with _progress(args) as progress:
        tables = bench_engine(
            model,
            args.batch,
            args.requests,
            args.rate,
            args.shared_prefix,
            args.longest,
            args.max_step_tokens,
            progress,
        )
    share = others.share()
    if not args.json:
        print(render(tables))
        if share is not None:
            print(f"other processes took {share:.1%} of the CPU time")
    found = {title: [asdict(result) for result in replays] for title, replays in tables.items()}
    print(json.dumps(found | {"others": share}))
    return 0


# What generate and chat share


def _model_folder(args: argparse.Namespace, adapters: Mapping[str, str] | None = None) -> Path:
    """The artifact, or the checkpoint that is to be compiled: either has the tokenizer.

    adapters: what is to be loaded; a compiled checkpoint gets slots for them.
    """
    from .sources import CheckpointFolder, ConfigFile, resolve_source

    path = Path(args.model).expanduser()
    if not _is_artifact(path):
        source = resolve_source(args.model)
        if isinstance(source, ConfigFile):
            raise InputError(
                f"{path}: a config has no tokenizer; accepted: an artifact, a checkpoint folder, "
                "a .gguf file, or a repo id"
            )
        if adapters:
            _fit_slots(args, source.config, adapters)
        return source.path if isinstance(source, CheckpointFolder) else _compiled(args, path)
    if given := _given(args, _COMPILE_OPTIONS):
        option = "--" + next(iter(given)).replace("_", "-")
        raise InputError(f"{option}: {path} is compiled already; accepted: with a checkpoint")
    return path


def _engine(
    args: argparse.Namespace, folder: Path, tokenizer: Tokenizer, sequences: int = 1
) -> Engine:
    """Of the artifact in `folder`, or of the one that its checkpoint is compiled to.

    It has KV pages for so many sequences of the whole context, as many as it can run at a time.
    """
    from .engine.draft_model import DraftModel
    from .engine.engine import Engine
    from .engine.prompt_lookup import PromptLookup
    from .memory import sequence_cache_tokens
    from .runtime.compiled import load
    from .runtime.threads import check_threads

    threads = check_threads(args.threads)
    speculation = PromptLookup() if args.prompt_lookup else None
    if args.draft is not None:
        speculation = DraftModel(load(Path(args.draft).expanduser(), threads=threads))
    if not _is_artifact(folder):
        folder = _compiled(args, folder)
    model = load(folder, args.device, threads)
    page_size = 16
    room = sequence_cache_tokens(model.manifest, page_size)
    room *= min(sequences, model.manifest.limits.max_batch_size)
    return Engine(model, tokenizer, room, page_size, speculation=speculation)


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    """Name → folder or repo id."""
    adapters: dict[str, str] = {}
    for given in args.adapter:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise InputError(f"--adapter: found {given!r}; accepted: NAME=PATH")
        if name in adapters:
            raise InputError(f"--adapter: found {name!r} twice; accepted: a name for each")
        adapters[name] = path
    if adapters and args.max_loras == 0:
        raise InputError("--max-loras: found 0; accepted: 1 or more, with --adapter")
    return adapters


def _fit_slots(args: argparse.Namespace, config: Phi3Config, adapters: Mapping[str, str]) -> None:
    """Reads the adapters before anything is compiled, and chooses how many slots and of what rank:
    a power of two of them, so that one adapter more does not always compile anew."""
    from .adapters.layout import RANKS
    from .adapters.peft_files import adapter_folder, read_adapter

    most = args.max_rank or max(RANKS)
    ranks = [read_adapter(adapter_folder(p), config, most).rank for p in adapters.values()]
    if args.max_rank is None:
        args.max_rank = min(rank for rank in RANKS if rank >= max(ranks))
    if args.max_loras is None:
        args.max_loras = 1 << (len(adapters) - 1).bit_length()


def _compiled(args: argparse.Namespace, source: Path) -> Path:
    """The artifact of a checkpoint in the cache, compiled now if it is not there."""
    from .artifact_cache import cached_artifact

    options = _given(args, _COMPILE_OPTIONS)
    with _progress(args) as progress:
        return cached_artifact(source, _cache_dir(args), progress=progress, **options)


def _is_artifact(folder: Path) -> bool:
    from .artifact import MANIFEST

    return (folder / MANIFEST).is_file()


def _cache_dir(args: argparse.Namespace) -> Path:
    if args.cache_dir is not None:
        return Path(args.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "phi3c"


def _prompt_text(args: argparse.Namespace) -> str:
    if args.raw and args.system is not None:
        raise InputError("--system: found with --raw; accepted: with the chat template")
    text, where = args.prompt, "--prompt"
    if text is None:
        where = f"--prompt-file {args.prompt_file}"
        try:
            if args.prompt_file == "-":
                data = sys.stdin.buffer.read()
            else:
                data = Path(args.prompt_file).expanduser().read_bytes()
            text = data.decode()
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
    if not text:
        raise InputError(f"{where}: found nothing; accepted: some text")
    return text


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    """One user message in the checkpoint's template; the bare text with --raw or without one."""
    if args.raw or (args.system is None and not tokenizer.has_chat_template):
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return tokenizer.encode_chat(messages)


def _sampling_params(args: argparse.Namespace, folder: Path) -> SamplingParams:
    from .engine.generation_config import generation_defaults
    from .engine.sampler import SamplingParams

    defaults, given = generation_defaults(folder), _given(args, _SAMPLING_OPTIONS)
    if defaults["temperature"] == 0 and "temperature" not in given:
        if unused := [name for name in ("top_p", "top_k", "min_p") if name in given]:
            option = "--" + unused[0].replace("_", "-")
            raise InputError(f"{option}: this model is greedy by default; give --temperature too")
    return SamplingParams(**defaults | given, stop=args.stop, ignore_eos=args.ignore_eos)


def _show(answer: Answer, as_json: bool) -> None:
    """Streams the text and ends its last line, or prints one JSON object when all is done."""

    from .describe import answer_facts

    def end() -> None:
        answer.close()  # Ctrl-C may have come between two steps
        print(json.dumps(answer_facts(answer)) if as_json else "", flush=True)

    try:
        for piece in answer:
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        end()
        raise
    end()


def _next_line() -> str | None:
    """The user's next line, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise InputError("stdin: found bytes that are not text; accepted: UTF-8") from None


# What all commands share


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Progress | None]:
    """A bar per stage on stderr, if somebody looks at it."""
    if args.json or args.quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            unit = {"unit": "B", "unit_scale": True} if stage == "weights" else {}
            bars[stage] = tqdm(desc=stage, total=total, file=sys.stderr, **unit)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars[stage].close()

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given; the others keep the defaults of what they are passed to."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _print_error(error: Exception) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, Phi3CError):
        message = f"{type(error).__name__}: {message} (--verbose tells more)"
    print("phi3c: error:", " ".join(message.split()), file=sys.stderr)


def _silence_stdout() -> None:
    """The reader has gone; without this the interpreter complains once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_COMMANDS = {
    "compile": _compile,
    "convert": _convert,
    "generate": _generate,
    "chat": _chat,
    "inspect": _inspect,
    "link": _link,
    "targets": _targets,
    "bench": _bench,
    "verify": _verify,
}
