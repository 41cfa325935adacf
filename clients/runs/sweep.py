"""Settings to compare, and the requests that prompts, settings and seeds make.

Every request asks for all K texts (`n` is `best_of`), so that whatever is to be known of them needs no second run; that
costs the server nothing, and the tokens are the same.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from ..arguments import RESAMPLED, add_option, server_url, whole
from ..calls import DEFAULT_URL
from ..client import Client
from ..errors import ApiError, ClientError, ConnectionFailed, UnexpectedResponse
from ..options import guidance_of, request_body
from ..retry import RETRYABLE
from ..terminal import console, printable
from ..types import Model
from .engine import Servers
from .journal import Request, request
from .sources import Prompt

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
"""Of the question what is served, which a server answers at once or not at all."""
UNGUIDED = ("none", "bon")
"""The methods that take no gradient, and none of its settings."""

SWEPT: dict[str, tuple[type, tuple[str, ...], str, str]] = {
    "best-of": (int, ("best_of",), "K", "trajectories that compete"),
    "eta": (float, ("guidance", "eta"), "eta", "Adam's step size"),
    "gradient-steps": (int, ("guidance", "gradient_steps"), "M", "Adam steps in each guided step"),
    "every": (int, ("guidance", "every"), "every", "guide one of so many steps"),
    "model": (str, ("model",), "model", "the diffusion model, or an adapter of it"),
    "reward-model": (str, ("guidance", "reward_model"), "by", "the reward model that guides and chooses"),
    "steps": (int, ("diffusion", "steps"), "T", "denoising steps"),
    "algorithm": (str, ("diffusion", "algorithm"), "algorithm", "which positions are revealed first"),
    "block-length": (int, ("diffusion", "block_length"), "block", "fill the canvas in blocks of so many tokens"),
    "max-tokens": (int, ("max_tokens",), "L", "tokens of the answer at most"),
    "temperature": (float, ("temperature",), "tau", "of every draw"),
    "top-p": (float, ("top_p",), "top_p", "keep the most probable tokens up to this mass"),
    **{
        name: (kind, ("guidance", *name.split("-")), symbol, f"{text}; only for methods that resample")
        for name, (kind, symbol, text) in RESAMPLED.items()
    },
}
"""Flags that take several values: their type, the field of the request, the symbol in a setting's name, and help."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to ask: the fields of a request but for prompt and seed. The name says what differs within a sweep, and
    `series` the same without K: settings of one series are one curve of reward against compute."""

    name: str
    series: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """How rewards steer, as the command line has it."""
        return self.name.partition(" ")[0]

    @property
    def reward_model(self) -> str:
        """What guides, and chooses among the trajectories."""
        return str(self.fields["guidance"]["reward_model"])

    @property
    def best_of(self) -> int:
        """K."""
        return int(self.fields["best_of"])


def add_servers(parser: argparse.ArgumentParser) -> None:
    """Which servers are asked."""
    text = "a server; repeatable: all must serve the same models"
    add_option(parser, "--url", text, DEFAULT_URL, type=server_url, action="append")
    add_option(parser, "--api-key", "its API key", "the variable ENTRGI_API_KEY, if there is one")
    add_option(parser, "--concurrency", "requests in flight at each server", type=positive, default=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is swept."""
    group = parser.add_argument_group("what is asked; lists are separated by commas, and all combinations are asked")
    for name, (kind, _, _, text) in SWEPT.items():
        add_option(group, f"--{name}", text, "the server's", type=partial(listed, kind), metavar="LIST")
    seeds = partial(listed, int)
    add_option(group, "--seeds", "prompt i has each of these plus i", "0", type=seeds, default=(0,), metavar="LIST")
    group.add_argument("--raw", action="store_true", help="send texts as they stand, not as a turn of a chat")
    add_option(group, "--limit", "only the first prompts", "all", type=positive)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return whole(text, 1)


def listed(kind: type, text: str) -> tuple[Any, ...]:
    """The values of a list with commas. Raises ArgumentTypeError where one is of another kind."""
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"wanted are {wanted}, with commas between them, not {text!r}") from None


def servers_of(given: argparse.Namespace) -> Servers:
    """The servers of the command line."""
    return Servers(given.url or [DEFAULT_URL], given.concurrency, given.api_key)


def models_of(servers: Servers) -> list[Model]:
    """What the servers serve, by those that are there; of the others standard error says why not. They may come later:
    every request names its models. Raises ClientError where none is there, and where those that are would not answer
    alike."""
    found: dict[str, list[Model]] = {}
    away = []
    for url in servers.urls:
        try:
            with Client(url, api_key=servers.api_key, timeout=TIMEOUT) as client:
                found[url] = client.models()
        except ConnectionFailed as error:
            away.append(str(error))
        except UnexpectedResponse as error:
            raise ClientError(f"{url} is no entrgi server: {error}") from None
        except ApiError as error:
            if error.status not in RETRYABLE:
                raise ClientError(f"{url}: {error}") from None
            away.append(f"{url}: {error}")
    if not found:
        raise ConnectionFailed("; ".join(away))
    for told in away:
        console(stderr=True).print(f"going on without a server: {printable(told)}")
    first, *others = found
    known = _defaults(first, found[first])
    for url in others:
        own = _defaults(url, found[url])
        if [each.id for each in found[url]] != [each.id for each in found[first]]:
            raise ClientError(f"{url} serves other models than {first}; one run needs the same models everywhere")
        for name in sorted({*known, *own}):
            if own.get(name) != known.get(name):
                told = f"{url} has {own.get(name)!r} for the default {name}, {first} {known.get(name)!r}"
                raise ClientError(f"{told}; one run needs the same defaults everywhere")
    return found[first]


def _defaults(url: str, served: Sequence[Model]) -> dict[str, Any]:
    """The defaults of a server's diffusion models, by field and model. Raises ClientError where it has none."""
    models = [each for each in served if each.kind == "diffusion"]
    if not models or not all(isinstance(each.details.get("defaults"), dict) for each in models):
        raise ClientError(f"{url} is no entrgi server: it lists no diffusion model with its defaults")
    return {f"{name} of {each.id}": value for each in models for name, value in each.details["defaults"].items()}


def settings_of(given: argparse.Namespace, methods: Sequence[str], served: Sequence[Model]) -> list[Setting]:
    """All combinations of the command line's lists. A method may bring its own K, as `bon@4,8`. Settings that a method
    does not have make no combinations of it, and none resamples one trajectory. Every setting names its models, so that
    answers of others are never taken for its own; with method `none` the reward model only scores. Raises ClientError
    where nothing is left."""
    diffusion = next(model for model in served if model.kind == "diffusion")
    with_gradient = (model.id for model in served if model.kind == "reward")
    default_reward = next(with_gradient, diffusion.details["defaults"]["reward_model"])
    if default_reward is None:
        raise ClientError("the server has no reward model, so there is no reward to compare by")
    lists = {name: getattr(given, name.replace("-", "_")) or (None,) for name in SWEPT}
    several = {name for name, values in lists.items() if len(values) > 1} | {"best-of"}
    found: dict[str, Setting] = {}
    for text in methods:
        word, _, own = text.partition("@")
        try:
            own_lists = {**lists, **({"best-of": listed(int, own)} if own else {})}
        except argparse.ArgumentTypeError:
            raise ClientError(f"--method {text!r}: after @ numbers are wanted, as in {word}@4,8") from None
        for values in itertools.product(*own_lists.values()):
            guidance = request_body({}, guidance=guidance_of(word, reward_model=default_reward))["guidance"]
            fields: dict[str, Any] = {"model": diffusion.id, "guidance": guidance}
            named: dict[str, Any] = {}
            for (name, (_, path, symbol, _)), value in zip(SWEPT.items(), values, strict=True):
                if name == "best-of" and value is None:
                    value = diffusion.details["defaults"]["best_of"].get("bon", 1)
                if value is None or not _has(guidance, path):
                    continue
                _put(fields, path, value)
                if name in several:
                    named[symbol] = value
            fields["n"] = fields["best_of"]
            if "resample" in guidance and fields["best_of"] == 1:  # there is nobody to be copied
                continue
            parts = [f"{symbol}={value}" for symbol, value in named.items()]
            series = [part for part in parts if not part.startswith("K=")]
            setting = Setting(" ".join([word, *parts]), " ".join([word, *series]), fields)
            found.setdefault(setting.name, setting)
    if not found:
        raise ClientError("there is nothing to ask: resampling needs at least two trajectories (--best-of)")
    return [*found.values()]


def _has(guidance: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """Whether a field of the request has an effect with this guidance."""
    if path[:2] == ("guidance", "resample"):
        resample = guidance.get("resample")
        return resample is not None and (path[2] != "potential" or resample.get("by") != "confidence")
    return path[0] != "guidance" or path[1] == "reward_model" or guidance["method"] not in UNGUIDED


def _put(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        fields = fields.setdefault(name, {})
    fields[path[-1]] = value


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of a sweep, and what it came from."""

    prompt: Prompt
    setting: Setting
    seed: int
    request: Request


def asked(
    prompts: Iterable[tuple[int, Prompt]],
    settings: Sequence[Setting],
    seeds: Sequence[int],
    *,
    raw: bool,
    extra: Mapping[str, Any] | None = None,
) -> list[Asked]:
    """Every numbered prompt with every seed, to which its number is added, under one setting after the other: so a
    request has its like beside it, and its seconds are its setting's. `extra` fields are those of no setting."""
    found = []
    for setting, (number, prompt), seed in itertools.product(settings, prompts, seeds):
        fields = {**setting.fields, **(extra or {}), "seed": seed + number}
        found.append(Asked(prompt, setting, seed + number, generation(prompt, fields, raw=raw)))
    return found


def generation(prompt: Prompt, fields: Mapping[str, Any], *, raw: bool) -> Request:
    """The request for a prompt: a chat, or with `raw` a completion. Raises ClientError where messages are to be raw."""
    if not raw:
        return request("/v1/chat/completions", {"messages": prompt.messages, **fields})
    if not isinstance(prompt.query, str):
        raise ClientError(f"--raw sends texts as they stand, but prompt {prompt.id} is a chat's messages")
    return request("/v1/completions", {"prompt": prompt.query, **fields})
