"""What the commands share: flags that are named when misspelt, texts and prompts from files and standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import httpx
import msgspec

from .errors import ClientError
from .options import Message, Query

STDIN = "-"
RESAMPLED: dict[str, tuple[type, str, str]] = {
    "resample-by": (str, "from", "what makes a trajectory worth a copy: reward or confidence"),
    "resample-every": (int, "each", "steps between two resamplings"),
    "resample-strength": (float, "strength", "a trajectory weighs exp(strength x its reward)"),
    "resample-potential": (str, "potential", "difference (the present reward counts) or max (the largest so far)"),
    "resample-threshold": (float, "threshold", "resample below this share of effective trajectories"),
}
"""Flags of the fields of `options.Resample`: their type, symbol and help."""
_WANTED = (
    "wanted is text with one prompt on each line, or JSON lines (.jsonl): on each line an object with `prompt` "
    "(a string, or messages) or `messages` (a list of objects with `role` and `content`)"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest flag beside each one that does not exist."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but unknown arguments are an error of the command that they were given to."""
        self._given = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """As argparse's, with the nearest flags."""
        for flag in (word.partition("=")[0] for word in self._given if word.startswith("--")):
            near = get_close_matches(flag, [*self._option_string_actions], n=1)
            if near and near != [flag]:
                message += f"; {flag}: did you mean {near[0]}?"
        super().error(message)


def add_option(
    parser: argparse._ActionsContainer, flag: str, text: str, left_out: str = "%(default)s", **options: Any
) -> None:
    """A flag of which `text` says what it is and `left_out` what holds without it, beside argparse's `options`."""
    parser.add_argument(flag, help=f"{text} (default: {left_out})", **options)


def server_url(text: str) -> str:
    """The address of a server. Raises ArgumentTypeError where it is none."""
    try:
        url = httpx.URL(text)
        if url.scheme in ("http", "https") and url.host and (url.port or 0) < 65536:
            return text
    except httpx.InvalidURL:
        pass
    raise argparse.ArgumentTypeError(f"wanted is a server's address, as http://127.0.0.1:8000, not {text!r}")


def whole(text: str, least: int = 0) -> int:
    """A whole number from `least` on. Raises ArgumentTypeError where it is none."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted is a whole number from {least} on, not {text!r}")
    return value


def texts_of(arguments: Sequence[str]) -> list[str]:
    """The arguments, with what standard input holds, without the line ends at its end, in place of the one that is
    `-`. Raises ClientError where two are."""
    if arguments.count(STDIN) > 1:
        raise ClientError("only one argument can be -, which stands for all of standard input")
    return [read_text(text).rstrip("\r\n") if text == STDIN else text for text in arguments]


def prompts_of(source: str) -> list[Query]:
    """The prompts of a file, or of standard input where `source` is `-`: each a raw prompt, or the messages of a chat.
    Raises ClientError, which says what is wanted, where it is another kind of file or holds no prompt."""
    if Path(source).suffix not in ("", ".txt", ".jsonl"):
        raise ClientError(f"{source}: {_WANTED}")
    lines = [line.removesuffix("\r") for line in read_text(source).split("\n") if line.strip()]
    if not lines:
        raise ClientError(f"{source} holds no prompt; {_WANTED}")
    if not (source.endswith(".jsonl") or lines[0].lstrip().startswith("{")):
        return [*lines]
    return [_asked(line, f"{source}, prompt {number}") for number, line in enumerate(lines, 1)]


def read_text(source: str) -> str:
    """What a file holds, or standard input where `source` is `-`. Raises ClientError."""
    try:
        raw = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise ClientError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClientError(f"{source} is not text in UTF-8; {_WANTED}") from None


class _Line(msgspec.Struct):
    prompt: str | list[Message] | None = None
    messages: list[Message] | None = None


def _asked(line: str, place: str) -> Query:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ClientError(f"{place}: {error}; {_WANTED}") from None
    asked = [each for each in (found.prompt, found.messages) if each is not None]
    if len(asked) != 1:
        raise ClientError(f"{place} needs either `prompt` or `messages`; {_WANTED}")
    return asked[0]
