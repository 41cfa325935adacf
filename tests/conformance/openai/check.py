"""OpenAI's own client: sync, async, streams, batches, errors, and this server's objects in `extra_body`."""

from __future__ import annotations

import asyncio
import json
import time

import openai
import openai.types.responses
from checks import KEY, MESSAGES, MODEL, PROMPT, REWARD, URL, check, equal, main, raises, true

SERVER = {"base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
client = openai.OpenAI(**SERVER)


@check
def models() -> None:
    """models: list, retrieve"""
    listed = [model.id for model in client.models.list()]
    true({MODEL, REWARD} <= set(listed), listed)
    equal(client.models.retrieve(MODEL).id, MODEL)


@check
def completions() -> None:
    """completions: text and token prompts, n, suffix, stop, seed"""
    one, again = (client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, seed=1) for _ in range(2))
    equal(one.choices[0].text, again.choices[0].text)
    true(one.choices[0].finish_reason in ("stop", "length"))
    true(one.usage and one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens, one.usage)
    batch = client.completions.create(model=MODEL, prompt=["One", "Two"], n=2, max_tokens=8, suffix=" end", stop=["."])
    equal([choice.index for choice in batch.choices], [0, 1, 2, 3])
    true(all("." not in choice.text for choice in batch.choices))
    equal(client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=8).usage.prompt_tokens, 3)


@check
def chat() -> None:
    """chat: whole answer and raw response"""
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_completion_tokens=16)
    answer = raw.parse()
    equal(answer._request_id, raw.headers["x-request-id"])
    equal(answer.object, "chat.completion")
    message = answer.choices[0].message
    equal((message.role, message.refusal, message.tool_calls), ("assistant", None, None))
    true(isinstance(message.content, str), message)


@check
def chat_stream() -> None:
    """chat: stream, usage, same text as the whole answer"""
    given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "seed": 2}
    whole = client.chat.completions.create(**given)
    text, usage, finish, roles = "", None, None, []
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish = choice.finish_reason or finish
    equal((text, finish), (whole.choices[0].message.content, whole.choices[0].finish_reason))
    equal(usage, whole.usage)
    equal(roles, ["assistant"])


@check
def stream_helper() -> None:
    """chat: the stream() helper's final completion"""
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=16, seed=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    true({"chunk", "content.done"} <= kinds, kinds)
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, seed=2)
    equal(final.choices[0].message.content, whole.choices[0].message.content)


ANSWERED = {"model": MODEL, "instructions": "Be brief.", "input": PROMPT, "extra_body": {"seed": 2}}


@check
def responses() -> None:
    """responses: a text, a conversation with an earlier answer, shape, guidance in extra_body"""
    answer = client.responses.create(**ANSWERED)
    openai.types.responses.Response.model_validate(answer.to_dict())
    equal((answer.status, answer.error, answer.model), ("completed", None, MODEL))
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    chat_answer = client.chat.completions.create(model=MODEL, messages=turns, seed=2)
    equal(answer.output_text, chat_answer.choices[0].message.content)
    equal(answer.usage.total_tokens, chat_answer.usage.total_tokens)
    turns = [*turns, *answer.output, {"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}]
    body = {"guidance": {"method": "entrgi", "gradient_steps": 1}, "best_of": 2}
    again = client.responses.create(model=MODEL, input=turns, max_output_tokens=4, store=False, extra_body=body)
    equal((again.status, again.incomplete_details.reason), ("incomplete", "max_output_tokens"))
    equal(again.reward, max(again.guidance["rewards"][0]))


@check
def responses_stream() -> None:
    """responses: stream, and the stream() helper's final response, same text as the whole answer"""
    whole = client.responses.create(**ANSWERED)
    events = list(client.responses.create(**ANSWERED, stream=True))
    equal([event.sequence_number for event in events], list(range(len(events))))
    equal((events[0].type, events[-1].type), ("response.created", "response.completed"))
    equal("".join(event.delta for event in events if event.type == "response.output_text.delta"), whole.output_text)
    equal(events[-1].response.usage, whole.usage)
    with client.responses.stream(**ANSWERED) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    true({"response.output_item.added", "response.output_text.done", "response.output_item.done"} <= kinds, kinds)
    equal((final.output_text, final.guidance["seed"]), (whole.output_text, 2))


@check
def guided() -> None:
    """extra_body: guidance (short and long form), best_of, rewards in the answer"""
    given = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 3}
    short = client.completions.create(**given, n=2, best_of=3, extra_body={"guidance": "bon"})
    rewards = [choice.reward for choice in short.choices]
    equal(rewards, sorted(rewards, reverse=True))
    equal(len(short.guidance["rewards"][0]), 3)
    guidance = {"method": "entrgi", "reward_model": REWARD, "gradient_steps": 1, "eta": 0.5}
    body = {"best_of": 2, "guidance": guidance, "return_token_ids": True}
    long = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, extra_body=body)
    equal((long.guidance["method"], long.guidance["reward_models"]), ("entrgi", [REWARD]))
    equal(len(long.choices[0].token_ids), 12)


@check
def diffusion() -> None:
    """extra_body: diffusion, trace, stream_canvas"""
    body = {"diffusion": {"steps": 4, "algorithm": "maskgit_plus"}, "trace": True}
    given = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 4}
    answer = client.completions.create(**given, extra_body=body)
    equal(answer.guidance["steps"], 4)
    true(answer.trace[0][0], answer.trace)
    chunks = client.completions.create(**given, stream=True, extra_body=body | {"stream_canvas": True})
    canvases = [chunk.canvas for chunk in chunks if "canvas" in (chunk.model_extra or {})]
    equal(canvases[-1]["tokens"].count(None), 0)


@check
async def asynchronously() -> None:
    """async: eight at a time, and a stream"""
    async with openai.AsyncOpenAI(**SERVER) as aio:
        given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12}
        answers = await asyncio.gather(*(aio.chat.completions.create(**given, seed=seed) for seed in range(8)))
        stream = await aio.chat.completions.create(**given, seed=5, stream=True)
        text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
    equal(text, answers[5].choices[0].message.content)


@check
async def walking_away() -> None:
    """async: a stream closed half-way, and the client's own timeout"""
    async with openai.AsyncOpenAI(**SERVER) as aio:
        stream = await aio.completions.create(model=MODEL, prompt=PROMPT, max_tokens=64, stream=True)
        await anext(aiter(stream))
        await stream.close()
        try:
            await aio.completions.create(model=MODEL, prompt=PROMPT, max_tokens=256, timeout=0.05)
        except openai.APITimeoutError:
            return
    raise AssertionError("no timeout")


@check
def batches() -> None:
    """files and batches: upload, create, poll, download, cancel"""
    body = {"messages": MESSAGES, "max_tokens": 8, "seed": 1}

    def begun(count: int) -> openai.types.Batch:
        asked = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        lines = [json.dumps({"custom_id": f"line-{number}", **asked}) for number in range(count)]
        file = client.files.create(file=("requests.jsonl", "\n".join([*lines, "nonsense"]).encode()), purpose="batch")
        given = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return client.batches.create(input_file_id=file.id, **given)

    def ended(batch: openai.types.Batch) -> openai.types.Batch:
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            time.sleep(0.1)
            batch = client.batches.retrieve(batch.id)
        return batch

    batch = ended(begun(3))
    equal((batch.status, batch.request_counts.completed, batch.request_counts.failed), ("completed", 3, 1))
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    texts = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    equal(texts, {client.chat.completions.create(model=MODEL, **body).choices[0].message.content})
    (error,) = client.files.content(batch.error_file_id).text.splitlines()
    true("line 4" in json.loads(error)["response"]["body"]["error"]["message"], error)
    many = begun(500)
    equal(client.batches.cancel(many.id).status, "cancelling")
    equal(ended(many).status, "cancelled")
    equal({each.id for each in client.batches.list()}, {batch.id, many.id})
    true(client.files.delete(batch.input_file_id).deleted)


@check
def errors() -> None:
    """errors: 400, 401, 404 and 408 as its exceptions, with code, param and request id"""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    functions, earlier = [{"type": "function", "name": "f", "parameters": {}}], "previous_response_id"
    structured, respond = {"format": {"type": "json_object"}}, client.responses.create
    late = {"timeout": 1e-9}
    stranger = openai.OpenAI(**{**SERVER, "api_key": "wrong"})
    complete, chat_of, retrieve = client.completions.create, client.chat.completions.create, client.models.retrieve
    for kind, status, (code, param), call in (
        (openai.BadRequestError, 400, (None, "logprobs"), lambda: complete(model=MODEL, prompt="Hi", logprobs=2)),
        (openai.BadRequestError, 400, (None, "tools"), lambda: chat_of(model=MODEL, messages=MESSAGES, tools=tools)),
        (openai.BadRequestError, 400, (None, "tools"), lambda: respond(**ANSWERED, tools=functions)),
        (openai.BadRequestError, 400, (None, "store"), lambda: respond(**ANSWERED, store=True)),
        (openai.BadRequestError, 400, (None, "background"), lambda: respond(**ANSWERED, background=True)),
        (openai.BadRequestError, 400, (None, earlier), lambda: respond(**ANSWERED, previous_response_id="resp_1")),
        (openai.BadRequestError, 400, (None, "text.format.type"), lambda: respond(**ANSWERED, text=structured)),
        (openai.NotFoundError, 404, ("model_not_found", "model"), lambda: complete(model="gpt-4o", prompt="Hi")),
        (openai.NotFoundError, 404, ("model_not_found", None), lambda: retrieve("gpt-4o")),
        (openai.NotFoundError, 404, ("not_found", None), lambda: client.embeddings.create(model=MODEL, input="Hi")),
        (openai.AuthenticationError, 401, ("invalid_api_key", None), stranger.models.list),
        (openai.APIStatusError, 408, (None, None), lambda: complete(model=MODEL, prompt="Hi", extra_body=late)),
    ):
        wrong = raises(kind, call)
        true(wrong.request_id)
        equal((wrong.status_code, code and wrong.code, param and wrong.param), (status, code, param))


main("openai")
