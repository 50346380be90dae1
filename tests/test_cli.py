"""The command line: what it prints, its exit codes, and what it leaves behind when it fails."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint
from safetensors.numpy import load_file, save_file
from test_generate import CONTEXT, MODEL, VOCAB, write_tokenizer

from phi3c.cli import main
from phi3c.runtime.compiled import CompiledPhi3

COMPILE = ["--quantization", "q0f32", "--context-length", str(CONTEXT), "--max-batch-size", "2"]
COMPILE += ["--prefill-chunk-size", "16"]
# One thread: TVM's pool is slow, and these models tiny, where other programs use the cores.
GREEDY = ["--temperature", "0", "--ignore-eos", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(folder, **MODEL)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    """An artifact, and what `compile --json` said."""
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["compile", str(checkpoint), "-o", str(path), *COMPILE, "--json"]) == 0
    return path, json.loads(out.getvalue())


@pytest.fixture
def artifact(compiled) -> str:
    return str(compiled[0])


@pytest.fixture
def run(capsys):
    """run(*argv) → exit code, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ok(run):
    """The same for what must succeed: stdout."""

    def ok(*argv: object) -> str:
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        return out

    return ok


@pytest.fixture
def fails(run):
    """fails(code, text, *argv): the exit code, and one line on stderr that has the text."""

    def fails(code: int, text: str, *argv: object) -> str:
        found, out, err = run(*argv)
        assert err.startswith("phi3c: error: ") and err.count("\n") == 1 and text in err, err
        assert found == code
        return out

    return fails


def type_in(monkeypatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def answers(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


# The parser


def test_version_and_help(ok):
    assert ok("--version").startswith("phi3c 0.")
    assert "generate" in ok("--help")
    assert "--cache-dir" in ok("chat", "--help")


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["compile", "x"], "-o/--output"),
        (["generate", "x"], "--prompt"),
        (["generate", "x", "-p", "a", "--prompt-file", "b"], "not allowed with"),
        (["generate", "x", "-p", "a", "--top-k", "many"], "invalid int value: 'many'"),
        (["generate", "x", "-p", "a", "--max", "3"], "unrecognized arguments: --max"),
    ],
)
def test_usage_errors(fails, argv, text):
    fails(2, text, *argv)


# compile


def test_compile(compiled, checkpoint):
    path, facts = compiled
    assert facts["path"] == str(path) and facts["quantization"] == "q0f32"
    assert facts["limits"] == {
        "max_batch_size": 2,
        "context_length": CONTEXT,
        "prefill_chunk_size": 16,
    }
    assert facts["bytes"] > 100_000 and facts["seconds"] > 0 and facts["adapters"] is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def _to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "broken JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "other model": (lambda f: _config(f, model_type="llama"), "model_type: found 'llama'"),
    "missing tensor": (lambda f: _tensors(f, lambda t: t.pop(NORM)), f"missing tensor {NORM}"),
    "extra tensor": (
        lambda f: _tensors(f, lambda t: t.update(extra=np.zeros(1))),
        "extra: not a tensor of this config",
    ),
    "misshaped tensor": (
        lambda f: _tensors(f, lambda t: t.update({NORM: np.zeros(3, np.float32)})),
        f"{NORM}: found shape [3]; accepted: [64]",
    ),
    "truncated": (_truncate, "model.safetensors: not a whole safetensors file"),
    "pickle": (_to_pickle, "pytorch_model.bin, a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors file"),
    "NaN": (
        lambda f: _tensors(f, lambda t: t.update({NORM: np.full(64, np.nan, np.float32)})),
        f"{NORM}: found NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(fails, checkpoint, tmp_path, name):
    damage, text = BROKEN[name]
    folder, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    fails(2, text, "compile", folder, "-o", out / "model", *COMPILE)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "options, text",
    [
        (["--target", "abacus"], "target: found 'abacus'; accepted: cpu"),
        (["--quantization", "q9"], "quantization: found 'q9'; accepted: q0f32"),
        (["--context-length", "0"], "context_length: found 0; accepted: an integer from 1 to 256"),
        (["--prefill-chunk-size", "-1"], "prefill_chunk_size: found -1"),
        (["--max-loras", "-1"], "max_loras: found -1; accepted: an integer from 0 to 1024"),
        (["--max-rank", "64"], "--max-rank: found 64; accepted: with --max-loras"),
        (
            ["--max-loras", "1", "--max-rank", "12"],
            "max_rank: found 12; accepted: 8, 16, 32, 64 or 128",
        ),
    ],
)
def test_compile_options(fails, checkpoint, tmp_path, options, text):
    fails(2, text, "compile", checkpoint, "-o", tmp_path / "model", *options)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(fails, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    out = tmp_path / "out" / "model"
    fails(2, "no such file or folder", "compile", tmp_path / "gone", "-o", out)
    fails(2, "a file; accepted: a checkpoint", "compile", tmp_path / "weights.bin", "-o", out)
    assert not out.parent.exists()


def test_foreign_output(fails, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    (tmp_path / "file").write_text("text")
    for name, text in (("mine", "is not a phi3c artifact"), ("file", "is not a folder")):
        fails(2, text, "compile", checkpoint, "-o", tmp_path / name, *COMPILE)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_disk_full(fails, checkpoint, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            if self.tell() > 10_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("phi3c.tensor_file.open", FullDisk, raising=False)
    fails(1, "No space left on device", "compile", checkpoint, "-o", tmp_path / "model", *COMPILE)
    assert not list(tmp_path.iterdir())


def test_interrupted_compile(run, checkpoint, tmp_path, monkeypatch):
    stages = []

    def interrupt(self, name: str, start: int, stop: int):
        stages.append(name)
        if name.endswith("layers.1.mlp.down_proj.weight"):
            raise KeyboardInterrupt
        return rows(self, name, start, stop)

    from phi3c.weights import Checkpoint

    rows = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", interrupt)
    code, out, _ = run("compile", checkpoint, "-o", tmp_path / "model", *COMPILE)
    assert (code, out) == (130, "") and len(stages) > 4
    assert not list(tmp_path.iterdir())


# generate


def test_generate(ok, artifact, checkpoint):
    common = ("generate", artifact, "-p", "the cat", *GREEDY, "--max-tokens", 30)
    [facts] = answers(ok(*common, "--json"))
    assert ok(*common) == facts["text"] + "\n"
    assert len(facts["token_ids"]) == 30 and facts["finish_reason"] == "length"
    assert facts["prompt_tokens"] == facts["prefill_tokens"] > 3
    assert facts["prefill_seconds"] > 0 and facts["decode_tokens_per_second"] > 0
    [raw] = answers(ok(*common, "--raw", "--json"))
    [told] = answers(ok(*common, "--system", "be brief", "--json"))
    assert raw["prompt_tokens"] < facts["prompt_tokens"] < told["prompt_tokens"]


def test_the_prompt_is_the_checkpoints_template(ok, artifact, tmp_path, monkeypatch):
    text = "how are you?\nnaïve 🙂"
    rendered = "<|user|>" + text + "<|end|><|assistant|>"
    options = (*GREEDY, "--max-tokens", 12)
    expected = ok("generate", artifact, "-p", text, *options)
    assert ok("generate", artifact, "--raw", "-p", rendered, *options) == expected
    (tmp_path / "prompt").write_bytes(text.encode())
    assert ok("generate", artifact, "--prompt-file", tmp_path / "prompt", *options) == expected
    type_in(monkeypatch, text)
    assert ok("generate", artifact, "--prompt-file", "-", *options) == expected


def test_sampling_options(ok, artifact):
    def sample(*options: object) -> str:
        prompt = ("-p", "hello", "--temperature", 1.5, "--max-tokens", 20, "--ignore-eos")
        return ok("generate", artifact, *prompt, *options)

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample("--seed", 1, "--top-k", 1) == sample("--seed", 2, "--top-p", 0)
    text = sample("--seed", 1).rstrip("\n")
    assert sample("--seed", 1, "--stop", "~none~", "--stop", text[4:6]) == (
        text[: text.index(text[4:6])] + "\n"
    )


def test_defaults_of_the_generation_config(ok, checkpoint, artifact, tmp_path):
    """Greedy without do_sample; with it, the file's values unless an option says otherwise."""
    sampling = tmp_path / "sampling"
    shutil.copytree(artifact, sampling)
    config = {"eos_token_id": 2, "do_sample": True, "temperature": 1.9}
    (sampling / "generation_config.json").write_text(json.dumps(config))
    options = ("-p", "hello", "--max-tokens", 20, "--ignore-eos")
    greedy = ok("generate", artifact, *options)
    assert ok("generate", artifact, *options, "--temperature", 0) == greedy
    assert ok("generate", sampling, *options, "--temperature", 0) == greedy
    assert ok("generate", sampling, *options, "--seed", 1) != greedy


@pytest.mark.parametrize(
    "options, text",
    [
        (["-p", ""], "--prompt: found nothing; accepted: some text"),
        (["--prompt-file", "/nowhere/prompt"], "--prompt-file /nowhere/prompt: cannot be read"),
        (["-p", "the cat " * 99], f"up to {CONTEXT - 1}"),
        (["-p", "a\udcff"], "lone surrogate"),
        (["-p", "a", "--raw", "--system", "b"], "--system: found with --raw"),
        (["-p", "a", "--temperature", "-1"], "temperature: found -1.0"),
        (["-p", "a", "--max-tokens", "0"], "max_tokens: found 0"),
        (["-p", "a", "--stop", ""], "stop: found"),
        (["-p", "a", "--top-p", "0.9"], "--top-p: this model is greedy by default"),
        (["-p", "a", "--threads", "0"], "threads: found 0"),
        (["-p", "a", "--quantization", "q0f16"], "--quantization: "),
    ],
)
def test_generate_errors(fails, artifact, options, text):
    assert fails(2, text, "generate", artifact, *options) == ""


def test_generate_from_what_is_no_model(fails, artifact, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fails(2, "no such file or folder", "generate", tmp_path / "gone", "-p", "a")
    fails(2, "a config has no tokenizer", "generate", checkpoint / "config.json", "-p", "a")
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    fails(2, "tokenizer.json: no such file", "generate", bare, "-p", "a")
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    with open(broken / "model.so", "ab") as file:
        file.write(b"x")
    fails(2, "sha256", "generate", broken, "-p", "a")
    (broken / "manifest.json").write_text("{}")
    fails(2, "not the manifest of a phi3c artifact", "generate", broken, "-p", "a")
    type_in(monkeypatch, b"\xff\xfe")
    fails(2, "not UTF-8 at byte 0", "generate", artifact, "--prompt-file", "-")
    assert not (tmp_path / "cache").exists()


def test_without_a_template_the_prompt_is_raw(ok, fails, artifact, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(artifact, plain)
    write_tokenizer(plain, template=None)
    options = ("-p", "the cat", *GREEDY, "--max-tokens", 9)
    assert ok("generate", plain, *options) == ok("generate", plain, *options, "--raw")
    fails(2, "no chat template", "generate", plain, *options, "--system", "be brief")
    fails(2, "no chat template", "chat", plain)


def test_failures_that_are_not_the_users(fails, run, artifact, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(CompiledPhi3, "batch_prefill", fail)
    argv = ("generate", artifact, "-p", "a")
    assert fails(1, "RuntimeError: two lines (--verbose tells more)", *argv, "--json") == ""
    code, _, err = run(*argv, "--verbose")
    assert code == 1 and err.startswith("Traceback") and 'raise RuntimeError("two' in err
    assert err.splitlines()[-1].startswith("phi3c: error: RuntimeError: two lines")

    def interrupt(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledPhi3, "batch_prefill", interrupt)
    assert run(*argv) == (130, "\n", "")
    code, out, _ = run(*argv, "--json")
    assert code == 130 and answers(out)[0]["finish_reason"] == "cancelled"


def test_generate_follows_a_grammar(ok, fails, artifact, tmp_path):
    argv = (
        "generate",
        artifact,
        "-p",
        "hello",
        "--temperature",
        2,
        "--seed",
        3,
        "--max-tokens",
        40,
    )
    assert ok(*argv, "--choice", "a cat", "--choice", "the dog") in ("a cat\n", "the dog\n")
    [answer] = answers(ok(*argv, "--regex", "(ha){2,4}!", "--json"))
    assert re.fullmatch("(ha){2,4}!", answer["text"]) and answer["finish_reason"] == "stop"
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [1, 2]}')
    assert ok(*argv, "--json-schema", schema) in ("1\n", "2\n")
    fails(2, "found --json-schema and --regex", *argv, "--regex", "a", "--json-schema", schema)
    fails(2, "--json-schema: ", *argv, "--json-schema", tmp_path / "gone")
    fails(2, "regex: ", *argv, "--regex", "(a")


def test_speculation_changes_no_answer(ok, fails, artifact, tmp_path):
    argv = ("generate", artifact, "-p", "the cat the cat", *GREEDY, "--max-tokens", 30)
    plain = ok(*argv)
    assert ok(*argv, "--prompt-lookup") == ok(*argv, "--draft", artifact) == plain
    fails(2, "not allowed with argument", *argv, "--prompt-lookup", "--draft", artifact)
    fails(2, "no such folder", *argv, "--draft", tmp_path / "gone")


# Artifacts kept for checkpoints


@pytest.fixture
def compilations(artifact, monkeypatch) -> list[dict]:
    """Compilations asked for; instead of each the module's artifact is copied."""
    calls = []

    def copy(source, output, progress, **options):
        calls.append({"source": source} | options)
        if progress is not None:
            progress("weights", 1, 2)
        shutil.copytree(artifact, output)

    monkeypatch.setattr("phi3c.compiler.compile", copy)
    return calls


def test_kept_artifacts(ok, checkpoint, artifact, compilations, tmp_path):
    source, cache = tmp_path / "tiny", tmp_path / "cache"
    shutil.copytree(checkpoint, source)
    options = ("-p", "the cat", *GREEDY, "--max-tokens", 9)
    expected = ok("generate", artifact, *options)
    argv = ("generate", source, "--cache-dir", cache, *options)

    def kept() -> list[Path]:
        return [folder for group in cache.iterdir() for folder in group.iterdir()]

    def check(compiled_so_far: int, *more: object) -> None:
        assert ok(*argv, *more) == expected
        assert len(compilations) == compiled_so_far

    check(1)
    check(1)
    for change in (
        lambda: os.utime(source / "model.safetensors", ns=(1, 1)),
        lambda: (source / "generation_config.json").write_text('{"eos_token_id": [2, 6]}'),
    ):
        before, [old] = len(compilations), kept()
        change()
        check(before + 1)
        check(before + 1)
        assert kept() != [old]  # which is gone
    [folder] = kept()
    for name in ("model.so", "manifest.json", "params.safetensors"):
        before = len(compilations)
        data = (folder / name).read_bytes()
        (folder / name).unlink()  # earlier runs of this process have the old file mapped
        (folder / name).write_bytes(data[:100])
        check(before + 1)
    (folder / "model.so").unlink()
    check(7)
    check(8, *COMPILE)
    check(8, *COMPILE)
    assert len(kept()) == 2  # one a set of options
    assert compilations[-1] == {
        "source": source,
        "target": "cpu",
        "quantization": "q0f32",
        "max_batch_size": 2,
        "context_length": CONTEXT,
        "prefill_chunk_size": 16,
        "max_loras": 0,
        "max_rank": 16,
        "seed": 0,
    }


def test_cache_folder(ok, fails, checkpoint, compilations, tmp_path, monkeypatch):
    argv = ("generate", checkpoint, "-p", "a", "--max-tokens", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ok(*argv)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ok(*argv)
    for cache in ("xdg/phi3c", "home/.cache/phi3c"):
        [group] = (tmp_path / cache).iterdir()
        assert group.name.startswith("tiny-") and len(list(group.iterdir())) == 1
    (tmp_path / "file").write_text("")
    fails(1, "Not a directory", *argv, "--cache-dir", tmp_path / "file")


def test_a_failed_compilation_is_not_kept(fails, checkpoint, tmp_path):
    argv = ("generate", checkpoint, "-p", "a", "--cache-dir", tmp_path)
    fails(2, "quantization: found 'q9'", *argv, "--quantization", "q9")
    fails(2, "target: found 'abacus'", *argv, "--target", "abacus")
    assert not list(tmp_path.iterdir())


def test_progress_bars(run, checkpoint, compilations, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    argv = ("generate", checkpoint, "-p", "a", "--max-tokens", 1, "--cache-dir")
    assert "weights:  50%" in run(*argv, tmp_path / "1")[2]
    assert run(*argv, tmp_path / "2", "--quiet")[2] == ""
    assert run(*argv, tmp_path / "3", "--json")[2] == ""
    assert len(compilations) == 3


# chat


def test_chat(ok, artifact, monkeypatch):
    argv = ("chat", artifact, *GREEDY, "--max-tokens", 8)
    lines = "hello\n\nthe cat sat\n/reset\nhello\n/exit\nnever read\n"
    type_in(monkeypatch, lines)
    first, second, again = answers(ok(*argv, "--json"))
    assert first["token_ids"] == again["token_ids"]
    assert first["prompt_tokens"] < second["prompt_tokens"]
    type_in(monkeypatch, lines)
    assert ok(*argv) == "".join(turn["text"] + "\n" for turn in (first, second, again))
    # The second turn is what generate makes of the whole conversation.
    history = f"<|user|>hello<|end|><|assistant|>{first['text']}<|end|>"
    prompt = history + "<|user|>the cat sat<|end|><|assistant|>"
    whole = ok("generate", artifact, "--raw", "-p", prompt, *argv[2:])
    assert whole == second["text"] + "\n"


def test_chat_reuses_the_cache(ok, artifact, monkeypatch):
    """Beyond the LongRoPE switch, where every turn finds the whole pages of the last one."""
    system = ("--system", "you are a cat that sat on the mat and ran to the man")
    type_in(monkeypatch, "hello\nhow are you\n")
    first, second = answers(ok("chat", artifact, *GREEDY, *system, "--max-tokens", 6, "--json"))
    assert first["prefill_tokens"] == first["prompt_tokens"] > 32
    assert second["prefill_tokens"] <= second["prompt_tokens"] - first["prompt_tokens"] // 16 * 16


def test_chat_goes_on_after_a_turn_that_cannot_be(run, artifact, monkeypatch):
    type_in(monkeypatch, "the cat " * 99 + "\nhello\n")
    code, out, err = run("chat", artifact, *GREEDY, "--max-tokens", 8, "--json")
    [answer] = answers(out)
    assert code == 2 and err.startswith("phi3c: error: ") and err.count("\n") == 1
    type_in(monkeypatch, "hello\n")
    code, out, _ = run("chat", artifact, *GREEDY, "--max-tokens", 8, "--json")
    assert code == 0 and answers(out)[0]["token_ids"] == answer["token_ids"]


def test_chat_ctrl_c_stops_the_answer_only(ok, artifact, monkeypatch):
    decode, calls = CompiledPhi3.decode, []

    def interrupt(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(self, *args)

    monkeypatch.setattr(CompiledPhi3, "decode", interrupt)
    type_in(monkeypatch, "hello\nthe cat sat\n")
    first, second = answers(ok("chat", artifact, *GREEDY, "--max-tokens", 8, "--json"))
    assert first["finish_reason"] == "cancelled" and len(first["token_ids"]) == 4
    assert second["finish_reason"] == "length" and len(second["token_ids"]) == 8


def test_chat_ctrl_c_at_the_prompt_ends(run, artifact, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("chat", artifact) == (130, "", "")


# inspect


def test_inspect(ok, artifact):
    facts = json.loads(ok("inspect", artifact, "--json"))
    assert facts["model"]["hidden_size"] == 64 and facts["model"]["rope_type"] == "longrope"
    assert facts["quantization"] == "q0f32" and facts["limits"]["context_length"] == CONTEXT
    kv = facts["kv_cache"]
    assert kv["bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, dims, float32
    assert (kv["max_total_seq_len"], kv["bytes"]) == (2 * CONTEXT, 240 * kv["bytes_per_token"])
    layer = 64 * (64 + 64) + 64 * 64 + 2 * 64 + 3 * 64 * 96
    assert facts["parameters"]["count"] == 2 * VOCAB * 64 + 2 * layer + 64
    assert facts["parameters"]["bytes"] >= 4 * facts["parameters"]["count"]
    assert facts["functions"]["decode"]["inputs"][0]["shape"] == [1, 1, 64]
    assert facts["files"]["model.so"] > 0 and facts["versions"]["tvm"]
    more = json.loads(ok("inspect", artifact, "--json", "--max-total-seq-len", 1600))
    assert more["kv_cache"]["bytes"] == 1600 * kv["bytes_per_token"]

    text = ok("inspect", artifact)
    for word in ("2 layers", "4 heads (2 kv) of 16", "q0f32", "longrope from 32", "  decode("):
        assert word in text


def test_inspect_errors(fails, artifact, checkpoint, tmp_path):
    fails(2, "no such folder", "inspect", tmp_path / "gone")
    fails(2, "it has no manifest.json", "inspect", checkpoint)
    fails(2, "--max-total-seq-len: found 0", "inspect", artifact, "--max-total-seq-len", 0)


# As a program


def _program(*argv: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "phi3c", *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes | options)


def test_program_errors(tmp_path):
    program = _program("compile", tmp_path / "gone", "-o", tmp_path / "model")
    out, err = program.communicate(timeout=120)
    assert (program.returncode, out) == (2, "") and err.startswith("phi3c: error: ")
    assert err.count("\n") == 1


def test_program_compiles_and_generates(ok, artifact, checkpoint, tmp_path):
    """In a fresh process, straight from the checkpoint."""
    options = ("-p", "the cat", *GREEDY, "--max-tokens", 9)
    program = _program("generate", checkpoint, "--cache-dir", tmp_path, *COMPILE, *options)
    out, err = program.communicate(timeout=300)
    assert (program.returncode, err) == (0, "")
    assert out == ok("generate", artifact, *options)


def test_closed_pipe_is_quiet(artifact):
    program = _program("generate", artifact, "-p", "the cat", *GREEDY)
    assert program.stdout.read(1)
    program.stdout.close()
    assert program.wait(timeout=120) == 1
    assert program.stderr.read() == ""
    program.stderr.close()
