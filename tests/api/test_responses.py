"""`/v1/responses` on a real server: what chat completions answer, in another shape. OpenAI's own client reads it in
tests/conformance/openai."""

from __future__ import annotations

import json
from typing import Any

from server.wire.messages import Failed, Progress, Started
from tests.api.scripted_engine import ScriptedEngine, make, open_client, script
from tests.support.serving import Served

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ASKED: dict[str, Any] = {
    "input": "Tell me", "instructions": "Be brief.", "max_output_tokens": 8, "seed": 11, "guidance": "entrgi",
    "best_of": 3, "return_token_ids": True, "return_step_map": True, "trace": True,
}  # fmt: skip
OURS = ("trajectory", "stop_reason", "reward", "token_ids", "step_map")


def text_of(answer: dict[str, Any]) -> str:
    (message,) = answer["output"]
    (part,) = message["content"]
    assert {"type": "output_text", "annotations": [], "logprobs": []}.items() <= part.items()
    return str(part["text"])


def events_of(stream: str) -> list[dict[str, Any]]:
    """The events, each of which is named by its type."""
    events = []
    for event in stream.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_an_answer_is_that_of_a_chat(server: Served) -> None:
    answer = server.post(RESPONSES, ASKED).json()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me"}]
    shared = {name: value for name, value in ASKED.items() if name not in ("input", "instructions")}
    shared["max_tokens"] = shared.pop("max_output_tokens")
    chat = server.post(CHAT, {**shared, "messages": turns}).json()
    (choice,) = chat["choices"]
    assert text_of(answer) == choice["message"]["content"]
    assert {name: answer[name] for name in OURS} == {name: choice[name] for name in OURS}
    assert answer["status"] == {"stop": "completed", "length": "incomplete"}[choice["finish_reason"]]
    assert answer["trace"] == chat["trace"]
    assert answer["guidance"]["rewards"] == chat["guidance"]["rewards"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    echoed = {"instructions": "Be brief.", "max_output_tokens": 8, "store": False, "id": f"resp_{answer['id'][5:]}"}
    assert echoed.items() <= answer.items()


def test_forms_of_input_that_are_the_same(server: Served) -> None:
    asked = {"max_output_tokens": 6, "seed": 3}
    part = {"type": "input_text", "text": "Tell me"}
    forms: list[Any] = ["Tell me", [{"role": "user", "content": "Tell me"}]]
    forms += [[{"type": "message", "role": "user", "content": [part]}]]
    first, *others = [server.post(RESPONSES, {**asked, "input": form}).json() for form in forms]
    assert [text_of(other) for other in others] == [text_of(first)] * 2
    more = {"role": "user", "content": "More"}
    back = server.post(RESPONSES, {**asked, "input": [*forms[1], *first["output"], more]})
    spoken = server.post(
        RESPONSES, {**asked, "input": [*forms[1], {"role": "assistant", "content": text_of(first)}, more]}
    )
    assert back.status_code == 200, back.text
    assert text_of(back.json()) == text_of(spoken.json())


def test_events_are_the_answer(server: Served) -> None:
    asked = {**ASKED, "best_of": 1}
    whole = server.post(RESPONSES, asked).json()
    response = server.post(RESPONSES, {**asked, "stream": True, "stream_canvas": True})
    events = events_of(response.text)
    kinds = [event["type"] for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert kinds[:4] == [f"response.{kind}" for kind in begin]
    assert kinds[-4:] == [f"response.{kind}" for kind in end]
    assert {*kinds[4:-4]} == {"response.output_text.delta", "response.canvas"}
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == events[-4]["text"] == text_of(whole)
    assert [*events[-1]["response"]["output"]] == [events[-2]["item"]]
    same = ("status", "usage", "trace", *OURS)
    assert {name: events[-1]["response"][name] for name in same} == {name: whole[name] for name in same}
    assert events[0]["response"]["output"] == []
    canvases = [event["canvas"] for event in events if event["type"] == "response.canvas"]
    assert [canvas["step"] for canvas in canvases] == sorted(set(whole["step_map"]))


async def test_a_failure_after_the_first_event_is_the_last_one() -> None:
    engine = ScriptedEngine(script(Started(""), Progress("", 0, 0, [(0, 43)]), Failed("", "engine_failed", "lost")))
    async with open_client(make(engine)) as client:
        response = await client.post(RESPONSES, json={"input": "Hi", "stream": True})
    *_, delta, last = events_of(response.text)
    assert delta["delta"] == "H"
    told = {"message": "lost", "param": None, "code": "internal_error"}
    assert last == {**told, "type": "error", "error": {**told, "type": "server_error"}} | {
        "sequence_number": last["sequence_number"]
    }
