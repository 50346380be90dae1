"""A checkpoint's own chat template: messages in, prompt text out.

A template is a program that somebody else wrote, so it runs in jinja2's sandbox and sees plain
JSON types only. It gets the settings, tags, filters and functions that transformers gives it.
`chat_template.jinja` beats a template in `tokenizer_config.json`, as in transformers; there is no
template of phi3c's own. Not here: tools, documents and images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3c.errors import CheckpointError, InputError

__all__ = ["ChatTemplate", "find_chat_template", "one_line", "read_text"]


class ChatTemplate:
    """One template. It is compiled when first used: a broken one hurts only those who chat."""

    def __init__(self, template: str, source: str) -> None:
        """source: the checkpoint that errors name."""
        self._template = template
        self._source = source

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
    ) -> str:
        """The prompt text. special_tokens: template variables such as bos_token.

        InputError if the template refuses the messages or fails on them, CheckpointError if it is
        broken or reaches out of the sandbox.
        """
        template = self._compiled
        try:
            return template.render(
                messages=_plain_messages(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except InputError:
            raise
        except _TemplateRefusal as error:
            raise InputError(f"messages: the chat template refuses: {one_line(error)}") from None
        except SecurityError as error:
            raise CheckpointError(
                f"{self._source}: unsafe chat template: {one_line(error)}"
            ) from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(
                f"messages: the chat template fails on them: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._template)
        except Exception as error:  # mostly TemplateSyntaxError, but the source can be anything
            line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
            raise CheckpointError(
                f"{self._source}: broken chat template: {line}{one_line(error)}"
            ) from None


def find_chat_template(folder: Path, config: Mapping[str, Any], config_file: Path) -> str | None:
    """The text of a checkpoint's template, None if it has none.

    config: the contents of config_file (tokenizer_config.json).
    """
    template = read_text(folder / "chat_template.jinja")
    if template is not None:
        return template
    found = config.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {}
    if not isinstance(named.get("default"), str):
        raise CheckpointError(
            f"{config_file}: chat_template: found templates named {sorted(map(str, named))}; "
            "accepted: a string, or a list of {name, template} with one named 'default'"
        )
    return named["default"]


def read_text(file: Path) -> str | None:
    """A file's text, None where there is no file; CheckpointError if it cannot be read."""
    if not file.exists():
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: it does not accept these messages."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training. Here it only opens a scope."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Settings, tags, filters and functions that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes for HTML, which a model was never trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of plain JSON types, so that a template sees no object with methods of its own."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages: found {messages!r}; accepted: a non-empty list of dicts")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{at}]: found {message!r}; accepted: a dict with a role")
    try:
        plain = json.loads(json.dumps(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: {error}; accepted: strings, numbers, lists, dicts") from None
    # An explicit None ("content": null beside tool calls) means absent, as in transformers.
    return [{key: value for key, value in msg.items() if value is not None} for msg in plain]
