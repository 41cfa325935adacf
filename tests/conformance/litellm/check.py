"""LiteLLM as a library: completion, chat, streams, rerank by four providers, and how it maps our errors."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the import would download its price list

import litellm
from checks import KEY, MESSAGES, MODEL, PROMPT, REWARD, URL, check, equal, main, raises, true

SERVER = {"api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0, "max_retries": 0}
CHAT = {"model": f"openai/{MODEL}", "messages": MESSAGES, "max_tokens": 16, **SERVER}
TEXT = {"model": f"text-completion-openai/{MODEL}", "prompt": PROMPT, "max_tokens": 16, **SERVER}


@check
def chat() -> None:
    """chat: answer, usage, seed"""
    answer, again = (litellm.completion(**CHAT, seed=1, temperature=0.7, top_p=0.9) for _ in range(2))
    equal(answer.choices[0].message.role, "assistant")
    true(answer.usage.completion_tokens > 0, answer.usage)
    equal(answer.choices[0].message.content, again.choices[0].message.content)


@check
def chat_stream() -> None:
    """chat: stream, and its rebuilt answer"""
    whole = litellm.completion(**CHAT, seed=2)
    chunks = list(litellm.completion(**CHAT, seed=2, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    equal(text, whole.choices[0].message.content)
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    equal(rebuilt.choices[0].message.content, text)
    equal(rebuilt.usage.completion_tokens, whole.usage.completion_tokens)


@check
async def asynchronous() -> None:
    """chat: acompletion, whole and streamed"""
    whole = await litellm.acompletion(**CHAT, seed=3)
    stream = await litellm.acompletion(**CHAT, seed=3, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    equal(text, whole.choices[0].message.content)


@check
def guided() -> None:
    """chat: guidance and diffusion in extra_body"""
    body = {"guidance": {"method": "entrgi", "reward_model": REWARD}, "best_of": 2, "diffusion": {"steps": 8}}
    true(isinstance(litellm.completion(**CHAT, extra_body=body).choices[0].message.content, str))


@check
def completion() -> None:
    """completions: answer and stream"""
    whole = litellm.text_completion(**TEXT, seed=4, stop=["!"])
    true(whole.usage.completion_tokens > 0, whole.usage)
    stream = litellm.text_completion(**TEXT, seed=4, stop=["!"], stream=True)
    equal("".join(chunk.choices[0].text or "" for chunk in stream if chunk.choices), whole.choices[0].text)


@check
def rerank() -> None:
    """rerank: hosted_vllm, jina_ai, cohere, infinity"""
    documents = ["It was very bad.", "It was very good.", "Yes."]
    orders = []
    # Infinity's clients read a document as a string, where all others read an object: it has a path of its own.
    for provider, base in (("hosted_vllm", URL), ("hosted_vllm", f"{URL}/v1"), ("jina_ai", URL), ("cohere", URL),
                           ("infinity", f"{URL}/infinity")):  # fmt: skip
        asked = {"model": f"{provider}/{REWARD}", "query": PROMPT, "api_base": base, "api_key": KEY}
        answer = litellm.rerank(**asked, documents=documents)
        for result in answer.results:
            equal(result["document"]["text"], documents[result["index"]])
        orders.append([(result["index"], result["relevance_score"]) for result in answer.results])
        objects = [{"text": text} for text in documents]
        bare = litellm.rerank(**asked, documents=objects, top_n=2, return_documents=False).results
        equal([(result["index"], result["relevance_score"]) for result in bare], orders[-1][:2])
        true("document" not in bare[0] or bare[0]["document"] is None, bare)
    equal(orders, orders[:1] * len(orders))


@check
def errors() -> None:
    """errors: 400, 401, 404 and 408 as its exceptions"""
    raises(litellm.BadRequestError, lambda: litellm.completion(**CHAT, extra_body={"guidance": "unknown"}))
    raises(litellm.AuthenticationError, lambda: litellm.completion(**{**CHAT, "api_key": "wrong"}))
    raises(litellm.NotFoundError, lambda: litellm.completion(**{**CHAT, "model": "openai/gpt-none"}))
    raises(litellm.Timeout, lambda: litellm.completion(**CHAT, extra_body={"timeout": 1e-9}))
    large = raises(litellm.BadRequestError, lambda: litellm.completion(**{**CHAT, "max_tokens": 10_000}))
    true("max_tokens" in str(large), large)


main("litellm")
