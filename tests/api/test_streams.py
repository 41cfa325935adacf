"""Streams on a real server: the deltas are the text, and canvases show the filling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.serving import Served

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BASE: dict[str, Any] = {"prompt": "Tell me a story", "max_tokens": 16, "seed": 5}


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """The concatenated deltas of each choice."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            joined[choice["index"]] = joined.get(choice["index"], "") + delta
    return joined


def ends(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The last chunk of each choice."""
    finished = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"] is not None]
    assert len({c["index"] for c in finished}) == len(finished)
    return {c["index"]: c for c in finished}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 24},
    "n": {"n": 3},
    "several prompts": {"prompt": ["Tell me", "Hello", "Goodbye"], "n": 2},
    "entrgi, one trajectory": {"guidance": "entrgi", "best_of": 1},
    "best of 4": {"guidance": "bon"},
    "2 best of 3": {"guidance": "entrgi", "best_of": 3, "n": 2},
    "n equals best_of": {"guidance": "aps", "best_of": 2, "n": 2},
    "blocks": {"diffusion": {"block_length": 4}},
    "origin": {"diffusion": {"algorithm": "origin"}},
    "suffix": {"suffix": " The end."},
    "token ids": {"return_token_ids": True, "guidance": {"method": "none", "reward_model": "rm"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_deltas_are_the_text(server: Served, variant: str) -> None:
    body = {**BASE, **VARIANTS[variant]}
    whole = server.post(COMPLETIONS, body).json()
    chunks = server.stream(COMPLETIONS, body)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    for choice in whole["choices"]:
        end = ends(chunks)[choice["index"]]
        for key in ("finish_reason", "stop_reason", "reward", "token_ids"):
            assert end.get(key) == choice.get(key)
    report = chunks[-1]["guidance"]
    assert report["rewards"] == whole["guidance"]["rewards"]
    assert report["seed"] == 5
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all("usage" not in chunk for chunk in chunks)


def test_chat_deltas_are_the_text(server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "seed": 5, "n": 2}
    whole = server.post(CHAT, body).json()
    chunks = server.stream(CHAT, body)
    assert texts(chunks) == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(end["delta"] == {} for end in ends(chunks).values())


def test_text_comes_while_the_canvas_fills(server: Served) -> None:
    chunks = server.stream(COMPLETIONS, {**BASE, "ignore_eos": True, "diffusion": {"block_length": 1}})
    assert sum(bool(c["text"]) for chunk in chunks for c in chunk["choices"]) > 4


def test_stop_strings_cut_the_text_and_are_held_back(server: Served) -> None:
    whole = server.post(COMPLETIONS, {**BASE, "ignore_eos": True}).json()["choices"][0]["text"]
    stop = whole[5:8]
    body = {**BASE, "ignore_eos": True, "stop": [stop, "never-there"]}
    (cut,) = server.post(COMPLETIONS, body).json()["choices"]
    assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (whole[: whole.index(stop)], "stop", stop)
    chunks = server.stream(COMPLETIONS, body)
    assert texts(chunks)[0] == cut["text"]
    assert ends(chunks)[0]["stop_reason"] == stop


def test_usage(server: Served) -> None:
    whole = server.post(COMPLETIONS, BASE).json()
    chunks = server.stream(COMPLETIONS, {**BASE, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(COMPLETIONS, {**BASE, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("guidance", ["none", "entrgi"])
def test_canvas(server: Served, guidance: str) -> None:
    best_of = 1 if guidance == "none" else 2
    body = {**BASE, "guidance": guidance, "best_of": best_of, "stream_canvas": True, "return_token_ids": True}
    body |= {"trace": True, "ignore_eos": True}
    chunks = server.stream(COMPLETIONS, body)
    canvases = [chunk["canvas"] for chunk in chunks if "canvas" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "canvas" in chunk)
    for trajectory in range(best_of):
        mine = [canvas for canvas in canvases if canvas["trajectory"] == trajectory]
        assert [canvas["step"] for canvas in mine] == sorted({canvas["step"] for canvas in mine})
        shown: dict[int, str] = {}
        for canvas in mine:
            assert len(canvas["tokens"]) == len(canvas["entropy"]) == 16
            now = {i: token for i, token in enumerate(canvas["tokens"]) if token is not None}
            assert shown.items() <= now.items()  # a revealed token never changes
            assert len(now) > len(shown)
            assert all((canvas["entropy"][i] is None) == (i in now) for i in range(16))
            assert (canvas["reward"] is None) == (guidance == "none")
            shown = now
        assert len(shown) == 16
        assert [step["step"] for step in chunks[-1]["trace"][0][trajectory] if step["revealed"]] == [
            canvas["step"] for canvas in mine
        ]
