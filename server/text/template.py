"""From conversations to token ids, with the text of messages kept as data.

A chat template writes control tokens (`<|im_start|>`) around the messages. A message may hold the same characters; they
must not turn into the token, or a user could close their own turn and speak as somebody else. So before rendering, the
first character of every special-token string inside a content is replaced by a placeholder, one character for one
character, which no template takes for anything but text. What still looks like a special token in the rendered text
was written by the template: the text is cut there, the placeholders are turned back, and the runs between the cuts are
tokenised as plain characters. A conversation without such strings, almost every one, needs no cutting and is tokenised
at once.

The reward model reads a response between two runs of tokens, each tokenised by itself (algorithm, section 2): the
template's text before the response and the text after it, found by rendering a sentinel in the response's place.

A template is a small Jinja program that comes from the checkpoint, so it runs in Jinja's immutable sandbox. The
options and globals are those that transformers gives its templates (`trim_blocks`, `lstrip_blocks`, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, the `generation` block), so a published
template renders as it does there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import ConfigurationError, InvalidRequest, quote
from server.types import Message

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

# Unicode's private-use area: characters that mean nothing, so a template has no reason to look for one.
_PRIVATE_USE = range(0xE000, 0xF900)

Arguments: TypeAlias = Mapping[str, bool | int | float | str | None]
"""What a template is given beside the conversation."""
NOTHING: Arguments = MappingProxyType({})
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", *NAMED_TOKENS})
"""What the server itself gives to a template."""


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, arguments: Arguments = NOTHING
) -> list[int]:
    """Ids of a templated conversation. InvalidRequest (`messages`) when the template refuses it."""
    marked = _Marked(tokenizer, messages, arguments)
    return marked.encode(marked.render(messages, add_generation_prompt))


def open_chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], arguments: Arguments = NOTHING) -> list[int]:
    """Ids of a templated conversation up to the end of the last message's content, which a response continues.

    As in transformers, spaces at that end are left out where the template trims contents. InvalidRequest (`messages`)
    when the template refuses the conversation or does not write its last message.
    """
    marked = _Marked(tokenizer, messages, arguments)
    *earlier, last = messages
    opened = replace(last, content=f"{last.content}{marked.unused} ")
    before, found, after = marked.render([*earlier, opened], add_generation_prompt=False).rpartition(marked.unused)
    if not found:
        raise InvalidRequest(f"the chat template of {tokenizer.owner} does not write the last message", "messages")
    return marked.encode(before if after.startswith(" ") else before.rstrip())


def conversation_ids(tokenizer: Tokenizer, conversation: Sequence[Message], response: str) -> list[int]:
    """Ids of the whole conversation with `response` as its last, assistant turn, tokenised at once.

    What the final reward is computed on (algorithm, end of section 2).
    """
    return chat_ids(tokenizer, [*conversation, Message("assistant", response)], add_generation_prompt=False)


def query_text(conversation: Sequence[Message]) -> str:
    """What a response answers, for a scorer that takes two texts and no conversation: the message, where there is one
    alone, else all of them, each as `role: content` on a line of its own."""
    if len(conversation) == 1:
        return conversation[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in conversation)


def split_at_response(
    tokenizer: Tokenizer, conversation: Sequence[Message], response_suffix: str = "", response_prefix: str = ""
) -> tuple[list[int], list[int]]:
    """(ids before the response, ids after it) of the conversation with the response as its last, assistant turn.

    Each side is tokenised by itself (algorithm, section 2). `response_suffix` is text between the response and the
    template's closing tokens (infilling), `response_prefix` text between the opening ones and the response (prefill).
    ConfigurationError (`chat_template`) when the template does not write the
    last assistant turn exactly once.
    """
    around = [Message("assistant", response_prefix), Message("assistant", response_suffix)]
    marked = _Marked(tokenizer, [*conversation, *around])
    sentinel = marked.unused
    response = Message("assistant", response_prefix + sentinel)
    rendered = marked.render([*conversation, response], add_generation_prompt=False)
    before, *after = rendered.split(sentinel)
    if len(after) != 1:
        raise ConfigurationError(
            f"chat_template of {tokenizer.owner} writes the last assistant turn {len(after)} times instead of once"
        )
    return marked.encode(before), marked.encode(marked.mark(response_suffix) + after[0])


class _Marked:
    """Placeholders for the special-token strings of some messages and arguments, and the way back."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], arguments: Arguments = NOTHING) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments
        contents = [text for message in messages for text in (message.content, message.name or "")]
        contents += [value for value in arguments.values() if isinstance(value, str)]
        used = set().union(*contents)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self.unused = next(free, "")
        if not self.unused:
            raise InvalidRequest("the messages use every character of Unicode's private-use area", "messages")
        self.placeholders: dict[str, str] = {}
        for content in contents:
            for index in self._starts(content):
                first = content[index]
                if first not in self.placeholders:
                    self.placeholders[first] = next(free)
        self._back = {ord(placeholder): first for first, placeholder in self.placeholders.items()}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise InvalidRequest(f"{self.tokenizer.owner} has no chat template", "messages")
        names = (message.name and self.mark(message.name) for message in messages)
        return template.render(
            [Message(each.role, self.mark(each.content), name) for each, name in zip(messages, names, strict=True)],
            add_generation_prompt,
            {name: self.mark(value) if isinstance(value, str) else value for name, value in self.arguments.items()},
        )

    def mark(self, content: str) -> str:
        """`content` with the first character of every special-token string replaced."""
        if not self.placeholders:
            return content
        characters = list(content)
        for index in self._starts(content):
            characters[index] = self.placeholders[characters[index]]
        return "".join(characters)

    def encode(self, rendered: str) -> list[int]:
        """Ids of marked text: special tokens where the template wrote them, plain characters everywhere else."""
        if not self.placeholders:
            return self.tokenizer.encode(rendered)
        ids: list[int] = []
        end = 0
        for match in self.tokenizer.special_pattern.finditer(rendered):
            ids += self._run(rendered[end : match.start()], first=end == 0)
            ids += self.tokenizer.encode(match.group().strip() or match.group())
            end = match.end()
        return ids + self._run(rendered[end:], first=end == 0)

    def _run(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        text = text.translate(self._back)
        return self.tokenizer.encode_data(text) if first else self.tokenizer.encode_data_run(text)

    def _starts(self, content: str) -> list[int]:
        """Where a special-token string begins in `content`, one that is cut off by its end included: the template's
        own text behind the content must not complete it."""
        strings = self.tokenizer.special_strings
        if not strings:
            return []
        found = {match.start() for match in self.tokenizer.special_starts.finditer(content)}
        for end in {len(content), len(content.rstrip())}:  # templates often strip contents
            for start in range(max(0, end - len(strings[0]) + 1), end):
                if any(string.startswith(content[start:end]) for string in strings):
                    found.add(start)
        return sorted(found)


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
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special_tokens = dict(special_tokens)
        self.owner = owner
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(f"chat_template: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, arguments: Arguments = NOTHING) -> str:
        """The conversation as one string. InvalidRequest (`messages`) when the template refuses the conversation."""
        try:
            return self._template.render(
                **arguments,
                messages=[
                    {key: value for key, value in asdict(message).items() if value is not None} for message in messages
                ],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template is a program fed with the user's turns; whatever stops it, these turns are what it cannot do.
            refusal = f"the chat template of {self.owner} does not take these messages: {quote(str(error))}"
            raise InvalidRequest(refusal, "messages") from error
