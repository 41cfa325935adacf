"""Examples of scorers: rewards that are Python functions (docs/operations.md, Outside scorers).

    python -m server --scorers '{"name": "length", "target": "python:docs.scorers:length"}'

A function gets conversations, of which the last turn is the response to be scored, and for each of them the request's
`metadata` or None. It gives one finite number for each; more is better. It runs in a process of its own, on the
server's machine and with the server's rights; what it raises fails the request with 502.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

Conversations = list[list[dict[str, str]]]
Metadata = list[dict[str, Any] | None]

CODE = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
SECONDS, BYTES = 5, 512 * 2**20


def length(conversations: Conversations, metadata: Metadata) -> list[float]:
    """How far a response is from the wanted number of words, which is `metadata.words`, or 20."""
    wanted = [(known or {}).get("words", 20) for known in metadata]
    return [-abs(len(turns[-1]["content"].split()) - words) for turns, words in zip(conversations, wanted, strict=True)]


def valid_json(conversations: Conversations, metadata: Metadata) -> list[float]:
    """1 for a JSON object that has all keys of `metadata.keys`; less the later it stops to be JSON."""
    return [_as_json(turns[-1]["content"], known or {}) for turns, known in zip(conversations, metadata, strict=True)]


def _as_json(text: str, known: dict[str, Any]) -> float:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return 0.5 * error.pos / max(1, len(text))
    except RecursionError:  # thousands of brackets
        return 0.0
    return 1.0 if isinstance(value, dict) and value.keys() >= {*known.get("keys", ())} else 0.5


def passes_tests(conversations: Conversations, metadata: Metadata) -> list[float]:
    """The share of `metadata.tests`, each a Python statement as `assert add(1, 2) == 3`, that the response's code
    passes.

    This is no sandbox. It runs what a model writes and what clients send as tests, in an empty folder, and ends each
    run in time; but a run has the server's rights and its network, and what it starts itself may live on. Use it where
    both may do everything that the server may, or have the command below start a container (bubblewrap, nsjail, gVisor)
    without network and files.
    """
    tests = [(known or {})["tests"] for known in metadata]
    return [_passed(turns[-1]["content"], each) for turns, each in zip(conversations, tests, strict=True)]


def _passed(response: str, tests: list[str]) -> float:
    code = "\n".join(CODE.findall(response)) or response
    return sum(_runs(f"{code}\n{test}\n") for test in tests) / len(tests)


def _runs(program: str) -> bool:
    """Whether a program ends without an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES)),
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def right_answer(conversations: Conversations, metadata: Metadata) -> list[float]:
    """1 where the response's mathematical answer is that of `metadata.answer`, however it is written ("0.5" or
    "\\\\frac{1}{2}"), else 0. Needs the package math-verify."""
    from math_verify import parse, verify

    wanted = [parse(f"${(known or {})['answer']}$") for known in metadata]
    return [
        float(verify(answer, parse(turns[-1]["content"]))) for turns, answer in zip(conversations, wanted, strict=True)
    ]
