"""Structured output: what a grammar lets through is valid, and a bad one hurts only its request."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from pathlib import Path
from random import Random

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import check_pages
from test_tokenizer import BACKENDS, CONFIG

import phi3c
from phi3c.engine import grammar_compiler
from phi3c.engine.async_engine import AsyncEngine
from phi3c.engine.engine import Engine
from phi3c.engine.grammar import Grammar, GrammarLimits, grammar_from_options
from phi3c.engine.grammar_compiler import GrammarCompiler
from phi3c.engine.grammar_state import CompiledGrammar, GrammarState
from phi3c.engine.json_schema import enforceable_schema
from phi3c.engine.request import Handle, Output, Request
from phi3c.engine.sampler import SamplingParams
from phi3c.engine.tokenizer import Tokenizer
from phi3c.errors import InputError

TOY = Path(__file__).parent.parent / "examples" / "toy" / "checkpoint"
VOCAB = 448  # more than either tokenizer has

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "né", None]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "next"],
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number", "maximum": 9}},
            "required": ["x"],
        }
    },
}


def follows_schema(text: str) -> bool:
    """SCHEMA, by hand."""
    value = json.loads(text)
    after, age = value["next"], value["age"]
    return (
        set(value) - {"tags"} == {"name", "age", "next"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(age) is int
        and 0 <= age <= 150
        and len(value.get("tags", [])) <= 3
        and all(tag in ("a", "né", None) for tag in value.get("tags", []))
        and (isinstance(after, bool) or (list(after) == ["x"] and after["x"] <= 9))
    )


def matches(expression: str):
    return lambda text: re.fullmatch(expression, text, re.ASCII | re.DOTALL) is not None


CHOICES = ["yes", "no", " with a space", "日本", "né\n", "🙂🙂", "</s>", '"\\']
# name → a grammar, and what its answers pass
GRAMMARS = {
    "schema": (Grammar.json_schema(SCHEMA), follows_schema),
    "const": (Grammar.json_schema({"const": "né 🙂\n"}), lambda t: json.loads(t) == "né 🙂\n"),
    "date": (
        Grammar.regex(r"[12]\d{3}-[01]\d(-[0-3]\d)?"),
        matches(r"[12]\d{3}-[01]\d(-[0-3]\d)?"),
    ),
    "characters": (Grammar.regex("[à-ü]{2,5}.?[^a-z]"), matches("[à-ü]{2,5}.?[^a-z]")),
    "words": (Grammar.regex(r"(\s?(Hello|\w)){1,4}\S"), matches(r"(\s?(Hello|\w)){1,4}\S")),
    "choice": (Grammar.choice(CHOICES), CHOICES.__contains__),
}


@pytest.fixture(scope="module", params=list(BACKENDS))
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    BACKENDS[request.param]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(build_model) -> phi3c.CompiledPhi3:
    options = dict(max_batch_size=4, prefill_chunk_size=24, context_length=250)
    built = build_model("grammar", compile_options=options, vocab_size=VOCAB, eos_token_id=None)
    return phi3c.load(built.compiled.artifact.path, threads=1)


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return make_compiler(tokenizer)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> phi3c.CompiledPhi3:
    folder = tmp_path_factory.mktemp("grammar") / "toy"
    phi3c.compile(TOY, quantization="q0f32", output=folder, max_batch_size=8)
    return phi3c.load(folder, threads=1)


@pytest.fixture(scope="module")
def toy_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOY)


def make_compiler(tokenizer: Tokenizer, **limits) -> GrammarCompiler:
    limits = GrammarLimits(**limits)
    return GrammarCompiler(tokenizer, VOCAB, tokenizer.eos_token_ids, limits)


def ask(grammar: Grammar | None, seed: int, prompt=(5, 6, 7), n: int = 1, **params) -> Request:
    params = {"temperature": 1.5, "max_tokens": 150, "seed": seed} | params
    return Request(list(prompt), SamplingParams(**params), n=n, grammar=grammar)


def run_all(engine: Engine) -> None:
    while not engine.idle:
        engine.step()
        check_pages(engine)


def alone(engine: Engine, request: Request) -> list[int]:
    handle = engine.submit(request)
    run_all(engine)
    return handle.outputs[0].token_ids


def check_output(output: Output, passes, ends: frozenset[int]) -> bool:
    """Valid if it ended; True then."""
    if output.finish_reason == "length":
        return False
    assert output.finish_reason == "stop" and output.token_ids[-1] in ends
    assert passes(output.text), output.text
    return True


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.5, 1.5, 8.0])
def test_answers_are_valid(engine, name, temperature):
    grammar, passes = GRAMMARS[name]
    handles = [engine.submit(ask(grammar, seed, temperature=temperature)) for seed in range(12)]
    run_all(engine)
    ended = [check_output(h.outputs[0], passes, engine._ends()) for h in handles]
    assert sum(ended) >= 9, [h.outputs[0].text for h in handles]
    compiled = engine.compile_grammar(grammar)
    for handle in handles:
        [output] = handle.outputs
        assert output.text == engine.tokenizer.decode(output.token_ids)
        state = compiled.start()
        for token in output.token_ids:
            assert np.isfinite(state.mask(np.zeros(VOCAB, np.float32))[token])
            state.accept(token)


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_toy_answers_in_any_grammar(toy, name):
    grammar, passes = GRAMMARS[name]
    engine = Engine(toy)
    messages = [{"role": "user", "content": "reverse hello"}]
    handles = [
        engine.submit(
            Request(
                messages, SamplingParams(temperature=t, max_tokens=200, seed=seed), 1, 0, grammar
            )
        )
        for seed, t in enumerate([0, 1, 1, 2, 5, 20])
    ]
    run_all(engine)
    ended = [check_output(h.outputs[0], passes, engine._ends()) for h in handles]
    assert sum(ended) >= 3


def test_the_toy_still_knows_its_answer(toy):
    engine = Engine(toy)
    messages = [{"role": "user", "content": "reverse hello"}]
    greedy = SamplingParams(temperature=0, max_tokens=20)
    for grammar in (
        Grammar.choice(["hello", "olleh", "ollex"]),
        Grammar.regex("[a-z]+"),
    ):
        handle = engine.submit(Request(messages, greedy, grammar=grammar))
        run_all(engine)
        assert handle.outputs[0].text == "olleh"
        assert handle.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("pages", [14, 60])
def test_a_mixed_batch_is_as_if_each_were_alone(model, tokenizer, pages):
    """With few pages sequences are preempted and computed again."""
    engine = Engine(model, tokenizer, max_total_seq_len=16 * pages)
    requests = [
        ask(grammar, seed, range(3, 40 + 5 * seed), max_tokens=60)
        for seed, grammar in enumerate(
            [None, GRAMMARS["schema"][0], None, GRAMMARS["words"][0], GRAMMARS["schema"][0], None]
        )
    ]
    handles = [engine.submit(request) for request in requests]
    beside = Engine(model, tokenizer)
    run_all(engine)
    assert pages == 60 or engine.metrics().preemptions > 0
    for request, handle in zip(requests, handles, strict=True):
        assert handle.outputs[0].token_ids == alone(beside, request)
        if request.grammar is GRAMMARS["schema"][0]:
            check_output(handle.outputs[0], follows_schema, engine._ends())


@pytest.mark.parametrize(
    "drafts", [phi3c.PromptLookup(shortest=1, adaptive=False), None], ids=["lookup", "model"]
)
def test_speculation_follows_a_grammar(model, tokenizer, drafts):
    """The state goes on with the tokens that were sampled, not with those that were guessed."""
    drafts = drafts or phi3c.DraftModel(model, depth=4, width=2, adaptive=False)
    prompt = [5, 6, 7, 8, 9] * 4
    asked = [(GRAMMARS[name][0], seed) for name in ("schema", "date", "words") for seed in (1, 2)]

    def answers(engine: Engine) -> list[list[int]]:
        requests = [ask(grammar, seed, prompt, max_tokens=120) for grammar, seed in asked]
        handles = [engine.submit(request) for request in [*requests, ask(None, 9, prompt)]]
        run_all(engine)
        assert all(handle.error is None for handle in handles)
        return [handle.outputs[0].token_ids for handle in handles]

    speculating = Engine(model, tokenizer, speculation=drafts)
    assert answers(speculating) == answers(Engine(model, tokenizer))
    metrics = speculating.metrics()
    assert 0 < metrics.accepted_tokens < metrics.drafted_tokens


def test_each_sample_has_its_own_state(engine):
    handle = engine.submit(ask(GRAMMARS["schema"][0], 3, n=7))  # more than run at once
    run_all(engine)
    assert sum(check_output(o, follows_schema, engine._ends()) for o in handle.outputs) >= 5
    assert len({output.text for output in handle.outputs}) >= 5


def test_max_tokens_cuts_and_stop_strings_end(engine):
    grammar = Grammar.regex("(ab){20}")
    cut = engine.submit(ask(grammar, 1, max_tokens=3))
    stopped = engine.submit(ask(grammar, 1, stop=("bab",)))
    run_all(engine)
    assert cut.outputs[0].finish_reason == "length" and len(cut.outputs[0].token_ids) == 3
    assert stopped.outputs[0].finish_reason == "stop" and stopped.outputs[0].text == "a"


def test_the_mask_beats_biases_and_logprobs_are_before_it(engine):
    yes = engine.tokenizer.encode("y", add_special_tokens=False)[-1]
    params = {"logit_bias": {yes: -100.0, 9: 100.0}, "repetition_penalty": 2.0, "logprobs": 4}
    handle = engine.submit(ask(Grammar.choice(["y"]), 1, temperature=0, **params))
    run_all(engine)
    [output] = handle.outputs
    assert output.text == "y"
    for own, top in output.logprobs:
        assert np.isfinite([own, *top.values()]).all() and own < max(top.values())


def test_a_first_token_is_matched_as_it_is_shown(compiler, tokenizer):
    """A sentencepiece decoder drops the space that such a token begins with."""
    shown = {i: tokenizer.first_token_bytes(i) for i in range(tokenizer.vocab_size)}
    compiled = compiler.compile(Grammar.choice(["Hello", " b"]))
    allowed = np.isfinite(compiled.start().mask(np.zeros(VOCAB, np.float32)))
    for token in range(tokenizer.vocab_size):
        piece = shown[token] if token not in tokenizer.eos_token_ids else b""
        fits = b"Hello".startswith(piece) or b" b".startswith(piece)
        assert allowed[token] == (bool(piece) and fits)
    assert not allowed[tokenizer.vocab_size :].any()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    choices=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**32),
)
def test_any_choice_is_spelled_out(compiler, tokenizer, choices, seed):
    state, random = compiler.compile(Grammar.choice(choices)).start(), np.random.default_rng(seed)
    ids: list[int] = []
    while not ids or ids[-1] not in compiler._ends:
        allowed = np.flatnonzero(np.isfinite(state.mask(np.zeros(VOCAB, np.float32))))
        ids.append(int(random.choice(allowed)))
        state.accept(ids[-1])
    pieces = [tokenizer.token_bytes(i) for i in ids[:-1]]
    if pieces:
        pieces[0] = tokenizer.first_token_bytes(ids[0])
    assert b"".join(pieces).decode() in choices


# Requests that are refused

SLOW = "a?" * 3000 + "a" * 3000
BAD = {
    "broken": (Grammar.regex("(a"), r"regex: found .*parenthesis is not closed"),
    "look-around": (Grammar.regex("(?=a)b"), "regex: found .*Lookahead is not supported"),
    "anchor": (Grammar.regex("a^b"), r"regex: found what cannot be enforced: .*'\^'"),
    "nothing": (Grammar.regex(r"[^\s\S]"), "regex: found a grammar that no text"),
    "groups": (Grammar.regex("(" * 65 + "a" + ")" * 65), "found a nesting 65 deep; accepted: up"),
    "long": (Grammar.regex("a" * 70_000), "regex: found 70000 bytes; accepted: up to 65536"),
    "many": (Grammar.choice(["abcdefg"] * 10_000), "choice: found 70000 bytes; accepted"),
    "ambiguous": (
        Grammar.regex("((((a{0,100}){0,100}){0,100}){0,100}){0,100}"),
        "regex: found a grammar so ambiguous that one token takes",
    ),
    "no JSON": (Grammar.json_schema("{"), "json_schema: found no JSON"),
    "no schema": (Grammar.json_schema("[]"), "json_schema: #: found list; accepted: an object"),
    "type": (Grammar.json_schema({"type": "text"}), "#/type: found 'text'; accepted: object, arr"),
    "deep": (Grammar.json_schema("[" * 10_000), "found a nesting 10000 deep; accepted: up to 64"),
    "loop": (Grammar.json_schema({"$ref": "#"}), r"json_schema: found Circular \$ref chain"),
    "endless": (
        Grammar.json_schema(
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
        ),
        r"json_schema: found Circular \$ref chain .*: #/\$defs/a",
    ),
    "nowhere": (Grammar.json_schema({"$ref": "#/$defs/a"}), r"json_schema: found .*\$defs"),
    "remote": (Grammar.json_schema({"$ref": "http://a/b"}), r"#/\$ref: found 'http://a/b'"),
    "overlap": (
        Grammar.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        "json_schema: found what cannot be enforced: oneOf",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_is_refused_and_others_go_on(engine, name):
    grammar, message = BAD[name]
    good = engine.submit(ask(GRAMMARS["choice"][0], 1))
    free = engine.submit(ask(None, 1))
    engine.step()
    before = engine.metrics().requests
    with pytest.raises(InputError, match=message) as error:
        engine.submit(ask(grammar, 0))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert "accepted: " in str(error.value)
    assert engine.metrics().requests == before
    run_all(engine)
    assert good.outputs[0].text in CHOICES and free.done


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"not": {"type": "string"}}, "#: found not, which"),
        ({"type": "array", "uniqueItems": True}, "#: found uniqueItems, which"),
        ({"type": "array", "items": {"if": {}}}, "#/items: found if, which"),
        ({"type": "number", "multipleOf": 2}, "#: found multipleOf, which"),
        ({"minimum": 3}, "#: found minimum without its type"),
        ({"type": "string", "required": ["a"]}, "#: found required without its type"),
        ({"$defs": {"a": {}}, "$ref": "#/$defs/a", "type": "null"}, r"found type beside \$ref"),
        ({"type": "string", "enum": ["a", 1]}, "#: found type beside enum"),
        ({"type": "string", "const": 1}, "#: found type beside const"),
        ({"anyOf": [{"type": "null"}], "minimum": 1}, "#: found minimum beside anyOf"),
        ({"allOf": [{}, {}]}, "#/allOf: found 2 schemas; accepted: one"),
        ({"type": "object", "properties": {"a": {"contains": 1}}}, "#/properties/a: found contai"),
        ({"type": "object", "properties": []}, "#/properties: found list; accepted: named"),
        ({"type": "string", "pattern": 'a"b'}, "#/pattern: found 'a\"b'; accepted: print"),
        ({"type": "string", "pattern": "é."}, "#/pattern: found 'é.'"),
        ({"type": "string", "pattern": r"\n"}, "#/pattern: found"),
        ({"type": "string", "pattern": "a", "maxLength": 2}, "#: found maxLength beside pattern"),
        ({"type": "string", "format": "date", "minLength": 2}, "found minLength beside format"),
        ({"type": "string", "minLength": -1}, "#/minLength: found -1; accepted: an integer"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, r"found 2; accepted: minLength \(3\)"),
        ({"type": "object", "required": ["a"]}, "#/required: found 'a'; accepted: names in prop"),
        ({"type": "object", "required": "a"}, "#/required: found str"),
        (
            {"type": "object", "properties": {}, "propertyNames": {}},
            "#: found properties beside propertyNames",
        ),
        ({"type": "object", "minProperties": 2}, "#/minProperties: found names that are open"),
        ({"anyOf": {}}, "#/anyOf: found dict; accepted: a list"),
        ({"type": []} | {"type": [1]}, r"#/type: found \[1\]"),
    ],
)
def test_what_xgrammar_passes_over_is_refused(schema, found):
    with pytest.raises(InputError, match=f"json_schema: .*{found}"):
        enforceable_schema(json.dumps(schema))


def test_schemas_that_are_followed():
    enforceable_schema(json.dumps(SCHEMA))
    enforceable_schema("true")
    enforceable_schema(
        '{"type": ["integer", "string"], "minimum": 1, "maxLength": 3, "title": "x"}'
    )
    enforceable_schema('{"type": "integer", "enum": [1, 2.0], "default": 1, "uniqueItems": false}')
    enforceable_schema('{"properties": {}, "type": "object", "additionalProperties": false}')


STRINGS = [
    *({"format": name} for name in ["email", "date", "time", "date-time", "duration", "hostname"]),
    *(
        {"format": name}
        for name in ["ipv4", "ipv6", "uri", "uri-reference", "uri-template", "uuid"]
    ),
    *({"format": name} for name in ["json-pointer", "relative-json-pointer", "unknown"]),
    *({"pattern": text} for text in [".{1,3}", r"\W\S\D", "[^a]+", r"a\.[b-d]\$", "é|[à-ü]{2}"]),
    *({"minLength": least} for least in [0, 1, 5]),
    {"minLength": 2, "maxLength": 3},
    {},
]


@pytest.mark.parametrize("keywords", STRINGS, ids=str)
def test_every_string_is_one_in_json(compiler, tokenizer, keywords):
    schema = {"type": "array", "items": {"type": "string"} | keywords}
    compiled = compiler.compile(Grammar.json_schema(schema))
    for seed in range(40):
        random, state, text = np.random.default_rng(seed), compiled.start(), b""
        for at in range(80):
            allowed = np.isfinite(state.mask(np.zeros(VOCAB, np.float32)))
            tokens = np.flatnonzero(allowed)
            closing = [t for t in tokens if tokenizer.token_bytes(t)[:1] in (b'"', b"]")]
            end = [t for t in tokens if t in compiler._ends]
            token = int(random.choice(end or (closing if at > 25 and closing else tokens)))
            state.accept(token)
            if end:
                break
            first = tokenizer.first_token_bytes(token)
            text += tokenizer.token_bytes(token) if text else first
        if not end:
            continue
        for string in json.loads(text.decode()):
            if "pattern" in keywords:
                assert re.search(keywords["pattern"], string, re.ASCII)
            least, most = keywords.get("minLength", 0), keywords.get("maxLength", 1000)
            assert least <= len(string) <= most


def any_schema(random: Random, depth: int) -> dict | bool:
    """With every keyword that is not refused, in most of the ways they go together."""
    chance, pick = random.random, random.choice
    kind = random.randrange(5, 14) if depth == 0 else random.randrange(14)
    if kind < 2:
        names = random.sample(["a", "b", "ab", 'a"', "é"], random.randint(0, 4))
        schema = {"type": "object", "properties": {n: any_schema(random, depth - 1) for n in names}}
        schema["required"] = random.sample(names, random.randint(0, len(names)))
        if chance() < 0.4:
            schema["additionalProperties"] = pick([True, False, any_schema(random, depth - 1)])
        if chance() < 0.3:
            schema[pick(["minProperties", "maxProperties"])] = random.randint(1, 2)
        return schema
    if kind == 2:
        inner = any_schema(random, depth - 1)
        names = pick([{"patternProperties": {"^a.$": inner}}, {"additionalProperties": inner}])
        return {"type": "object"} | pick([names, {"propertyNames": {"pattern": "^x", **STRING}}])
    if kind == 3:
        schema = {"type": "array", "items": pick([any_schema(random, depth - 1), False])}
        if chance() < 0.4:
            count = random.randint(1, 3)
            schema["prefixItems"] = [any_schema(random, depth - 1) for _ in range(count)]
        return schema | {pick(["minItems", "maxItems"]): random.randint(0, 3)}
    if kind == 4:
        several = [any_schema(random, depth - 1) for _ in range(random.randint(1, 3))]
        return pick([{"anyOf": several}, {"oneOf": several}, {"allOf": several[:1]}])
    return [
        {"type": "integer", "minimum": random.randint(-20, 5), "maximum": random.randint(6, 300)},
        {"type": "number", "exclusiveMinimum": pick([-3.5, 0, 2])},
        {"type": "integer", "multipleOf": pick([2, 5, 7])},
        STRING | pick([{"minLength": 2}, {"maxLength": 3}, {"pattern": "^a+b?$"}]),
        {"type": random.sample(["integer", "string", "null", "boolean", "number"], 2)},
        {"enum": random.sample([1, "a", None, True, {"a": 1}, [1, 2], 'é"', 2.5], 3)},
        {"const": pick([1, "x\n", {"b": [None]}, [], False])},
        {},
        True,
    ][kind - 5]


STRING = {"type": "string"}


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_any_schema_is_followed_or_refused(compiler, tokenizer, seed):
    """Random tokens of its mask, against the jsonschema library."""
    random = Random(seed)
    schema = any_schema(random, 2)
    try:
        compiled = compiler.compile(Grammar.json_schema(schema))
    except InputError:
        return
    for _ in range(4):
        state, text = compiled.start(), b""
        for at in range(150):
            allowed = np.flatnonzero(np.isfinite(state.mask(np.zeros(VOCAB, np.float32)))).tolist()
            if set(allowed).intersection(compiler._ends):
                jsonschema.Draft202012Validator(schema).validate(json.loads(text.decode()))
                break
            closing = [t for t in allowed if tokenizer.token_bytes(t) in (b'"', b"}", b"]")]
            token = random.choice(closing if at > 15 and closing else allowed)
            state.accept(token)
            text += tokenizer.token_bytes(token) if text else tokenizer.first_token_bytes(token)


def test_what_is_no_grammar_is_refused():
    for make, message in [
        (lambda: Grammar("xml", ("a",)), "found kind 'xml'; accepted: json_schema, regex, choice"),
        (lambda: Grammar.choice([]), "choice: found .*; accepted: at least one text"),
        (lambda: Grammar.choice("ab"), "choice: found 'ab'; accepted: a list"),
        (lambda: Grammar.choice([1]), "choice: found int; accepted: a string"),
        (lambda: Grammar.regex("\ud800"), "regex: found a lone surrogate at 0"),
        (lambda: Grammar.json_schema({"a": {1}}), "json_schema: found dict: .*; accepted: a JSON"),
        (lambda: Request("a", grammar="a+"), r"grammar: found 'a\+'; accepted: a Grammar"),
        (
            lambda: Request("a", SamplingParams(ignore_eos=True), grammar=Grammar.regex("a")),
            "ignore_eos: found true; accepted: false",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            make()


def test_an_engine_that_cannot_is_named(model, tokenizer, monkeypatch):
    with pytest.raises(InputError, match="accepted: none, as the engine has no tokenizer"):
        Engine(model).submit(ask(Grammar.regex("a"), 0))
    engine = Engine(model, tokenizer)
    monkeypatch.setattr(engine, "_ends", frozenset)
    with pytest.raises(InputError, match="accepted: none, as the model has no eos token"):
        engine.submit(ask(Grammar.regex("a"), 0))
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InputError, match=r"needs xgrammar .*pip install 'phi3c\[grammar\]'"):
        Engine(model, tokenizer).submit(ask(Grammar.regex("a"), 0))


# What takes too long, or too much


def test_time_and_memory_are_bounded(toy_tokenizer):
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    compiler = make_compiler(toy_tokenizer, compile_seconds=1.0, compile_bytes=256 << 20)
    assert compiler.compile(Grammar.choice(["a"]))
    for grammar, message in [
        (Grammar.regex(SLOW), "regex: found a grammar that takes more than 1.0 s to compile"),
        (Grammar.json_schema(wide), "json_schema: found a grammar that takes more than (256|1.0)"),
    ]:
        start = time.perf_counter()
        with pytest.raises(InputError, match=message):
            compiler.compile(grammar)
        assert time.perf_counter() - start < 60  # the process may have to start first
        assert compiler.compile(Grammar.regex(f"a{len(message)}"))
    tight = make_compiler(toy_tokenizer, compiled_bytes=1000)
    with pytest.raises(InputError, match=r"found \d+ bytes when compiled; accepted: up to 1000"):
        tight.compile(GRAMMARS["schema"][0])


def test_a_process_that_dies_is_replaced(toy_tokenizer, monkeypatch):
    compiler = make_compiler(toy_tokenizer)
    compiler.compile(Grammar.regex("a"))
    compiler._worker.kill()  # with nothing to do
    compiler._worker.wait()
    assert compiler.compile(Grammar.regex("b"))
    monkeypatch.setattr(compiler._worker, "poll", lambda: None)
    compiler._worker.kill()  # as if while it compiles
    with pytest.raises(InputError, match=r"found a grammar that ends its compiler \(status -9\)"):
        compiler.compile(Grammar.regex("c"))
    assert compiler.compile(Grammar.regex("c"))
    worker = compiler._worker
    del compiler
    assert worker.poll() is not None


def test_an_interrupted_caller_leaves_no_answer_behind(toy_tokenizer, monkeypatch):
    def interrupted(worker, request):
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        raise KeyboardInterrupt

    compiler = make_compiler(toy_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("phi3c.engine.grammar_compiler._ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiler.compile(Grammar.regex("a"))
    state = compiler.compile(Grammar.regex("b")).start()
    [allowed] = np.flatnonzero(np.isfinite(state.mask(np.zeros(VOCAB, np.float32))))
    assert toy_tokenizer.token_bytes(int(allowed)) == b"b"


def test_the_last_used_grammars_are_kept(toy_tokenizer):
    a, b, c, d = (Grammar.choice([text]) for text in "abcd")
    compiler = make_compiler(toy_tokenizer, cached=2)
    first = compiler.compile(a)
    compiler.compile(b)
    assert compiler.compile(Grammar.choice(["a"])) is first
    compiler.compile(c)
    assert compiler.cached == [a, c]
    compiler = make_compiler(toy_tokenizer, cached_bytes=first.memory_bytes * 3)
    for grammar in (a, b, c, d):
        compiler.compile(grammar)
    assert compiler.cached == [b, c, d]


def test_a_grammar_that_fails_later_ends_its_request_only(engine, monkeypatch):
    def start(compiled: CompiledGrammar) -> GrammarState:
        state = GrammarState(compiled)
        if compiled is bad_grammar:
            state.accept = lambda token: GrammarState.accept(state, 0)  # special: never allowed
        return state

    bad_grammar = engine.compile_grammar(Grammar.regex("(ab){9}"))
    monkeypatch.setattr(CompiledGrammar, "start", start)
    failed = engine.metrics().failed
    bad = engine.submit(ask(Grammar.regex("(ab){9}"), 1))
    good = engine.submit(ask(GRAMMARS["choice"][0], 1))
    run_all(engine)
    assert bad.outputs[0].finish_reason == "error"
    assert str(bad.error) == "grammar: token 0 does not continue this answer"
    assert good.outputs[0].text in CHOICES and engine.metrics().failed == failed + 1


def test_a_slow_token_ends_its_request_only(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer)
    slow = engine.compile_grammar(Grammar.regex("(ab){9}"))
    slow.token_seconds = 0.0
    bad = engine.submit(ask(Grammar.regex("(ab){9}"), 1))
    good = engine.submit(ask(GRAMMARS["choice"][0], 1))
    run_all(engine)
    assert bad.outputs[0].finish_reason == "error" and "accepted: up to 0.0 s" in str(bad.error)
    assert good.outputs[0].text in CHOICES


def test_compiling_blocks_no_steps(model, tokenizer, monkeypatch):
    """One grammar is compiled all the while that others without any are answered."""
    compiling, goes_on = threading.Event(), threading.Event()

    def held(worker, request):
        compiling.set()
        assert goes_on.wait(60)
        return real(worker, request)

    async def run() -> None:
        engine = Engine(model, tokenizer, grammar_limits=GrammarLimits(compile_seconds=1.0))
        async with AsyncEngine(engine) as served:
            await served.submit(ask(Grammar.choice(["a"]), 0))  # imports xgrammar
            monkeypatch.setattr("phi3c.engine.grammar_compiler._ask", held)
            slow = asyncio.create_task(served.submit(ask(Grammar.regex(SLOW), 0)))
            assert await asyncio.to_thread(compiling.wait, 60)
            later = [ask(GRAMMARS["choice"][0], 1, temperature=0), ask(Grammar.choice(["a"]), 0)]
            behind = [asyncio.create_task(answer(served, request)) for request in later]
            for seed in range(3):
                await answer(served, ask(None, seed, max_tokens=20))
            assert not slow.done()
            goes_on.set()
            with pytest.raises(InputError, match="more than 1.0 s to compile"):
                await slow
            texts = await asyncio.gather(*behind)
            assert texts[0] in CHOICES and texts[1] == "a"

    async def answer(served: AsyncEngine, request: Request) -> str:
        handle: Handle = await served.submit(request)
        return "".join([piece.text async for piece in served.stream(handle)])

    real = grammar_compiler._ask
    asyncio.run(run())


def test_command_line_options(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "integer"}')
    assert grammar_from_options() is None
    assert grammar_from_options(json_schema=file) == Grammar.json_schema('{"type": "integer"}')
    assert grammar_from_options(regex="a+") == Grammar.regex("a+")
    assert grammar_from_options(choice=["a", "b"]) == Grammar.choice(["a", "b"])
    with pytest.raises(InputError, match="found --regex and --choice; accepted: one of them"):
        grammar_from_options(regex="a", choice=["b"])
    with pytest.raises(InputError, match=r"--json-schema: .*none.json: cannot be read"):
        grammar_from_options(json_schema=tmp_path / "none.json")
