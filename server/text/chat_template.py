"""Chat templates: small Jinja programs that a checkpoint brings and that write a conversation as one string.

A template comes from the checkpoint, so it runs in Jinja's immutable sandbox. The options and globals are those that
transformers gives its templates (`trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a
`tojson` that does not escape HTML, the `generation` block), so a published template renders as it does there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import ConfigurationError, InvalidRequest, quote
from server.types import Message


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> str:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """One compiled template and the special tokens' strings that it may name (`bos_token`, `eos_token`, ...).

    `owner` says in messages whose template it is ("the diffusion model", "reward model NAME").
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], owner: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _now
        self.special_tokens = dict(special_tokens)
        self.owner = owner
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(f"chat_template: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as one string. InvalidRequest (`messages`) when the template refuses the conversation."""
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template is a program fed with the user's turns; whatever stops it, these turns are what it cannot do.
            refusal = f"the chat template of {self.owner} does not take these messages: {quote(str(error))}"
            raise InvalidRequest(refusal, "messages") from error
