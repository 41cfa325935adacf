"""`batch`: a file of requests in OpenAI's batch format, answered by any server into a file of its output format."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import httpx
import msgspec

from ..arguments import read_text
from ..errors import ClientError
from ..terminal import console
from . import sweep
from .engine import answer_all
from .journal import Journal, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `batch`."""
    sweep.add_servers(parser)
    wanted = "requests: on each line an object with custom_id, method, url (the path) and body; - is standard input"
    parser.add_argument("input", metavar="IN", help=wanted)
    text = "the answers, one line each as they come; the same command goes on from it"
    parser.add_argument("output", type=Path, metavar="OUT", help=text)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the command; 0 if every request has a result."""
    requests = requests_of(given.input)
    wanted = {each.custom_id for each in requests}
    with Journal(given.output) as journal:
        _check_same(journal, {each.custom_id: each for each in requests})
        answer_all(requests, journal, sweep.servers_of(given), "requests")
        statuses = Counter(each.response.status_code for each in journal.records() if each.custom_id in wanted)
    failed = {status: count for status, count in sorted(statuses.items()) if status >= 400}
    told = ", ".join(f"{count} with status {status}" for status, count in failed.items())
    ending = f", of them {told}" if told else ""
    console(stderr=True).print(f"{statuses.total()} answers in {given.output}{ending}")
    return int(bool(failed))


def _check_same(journal: Journal, requests: Mapping[str, Request]) -> None:
    """Raises ClientError where the journal has an answer to another request under an id of these."""
    for record in journal.records():
        if record.request != requests.get(record.custom_id, record.request):
            raise ClientError(
                f"{journal.path} has an answer to another request named {record.custom_id!r}; name another file"
            )


def requests_of(source: str) -> list[Request]:
    """The requests of a file. Raises ClientError, which names the line, where one is not of OpenAI's batch format, has
    an id for the second time, asks for a stream, or is no POST to a path, so that the API key goes to no other server
    than the command line's."""
    found: dict[str, Request] = {}
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        try:
            each = msgspec.json.decode(line, type=Request)
        except msgspec.DecodeError as error:  # ValidationError is one
            raise ClientError(f"{source}, line {number}, is no request of OpenAI's batch format: {error}") from None
        if each.custom_id in found:
            raise ClientError(f"{source}, line {number}: custom_id {each.custom_id!r} stands on a line before it")
        if each.method != "POST" or not each.url.startswith("/") or each.url.startswith("//"):
            raise ClientError(
                f"{source}, line {number}: wanted are the method POST and a url that is a path, as /v1/..."
            )
        try:
            httpx.URL(each.url)
        except httpx.InvalidURL as error:
            raise ClientError(f"{source}, line {number}: {each.url!r} is no path: {error}") from None
        if each.body.get("stream"):
            raise ClientError(f"{source}, line {number}: `stream` has no place in a batch")
        found[each.custom_id] = each
    return [*found.values()]
