"""langchain-openai: chat and completion models, streams, batches, templates."""

from __future__ import annotations

import openai
from checks import KEY, MODEL, PROMPT, REWARD, URL, check, equal, main, raises, true
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

SERVER = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0}
chat = ChatOpenAI(**SERVER, max_tokens=16, seed=1, stream_usage=True)


@check
def invoke() -> None:
    """ChatOpenAI: invoke, usage and finish reason"""
    turns = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Hi."), HumanMessage(PROMPT)]
    answer = chat.invoke(turns)
    equal(answer.text, chat.invoke(turns).text)
    true(answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0, answer.usage_metadata)
    true(answer.response_metadata["finish_reason"] in ("stop", "length"), answer.response_metadata)
    equal(answer.response_metadata["model_name"], MODEL)


@check
def stream() -> None:
    """ChatOpenAI: stream with usage, same text as invoke"""
    chunks = list(chat.stream(PROMPT))
    equal("".join(chunk.text for chunk in chunks), chat.invoke(PROMPT).text)
    true(any(chunk.usage_metadata for chunk in chunks))


@check
async def asynchronous() -> None:
    """ChatOpenAI: ainvoke, astream, abatch"""
    whole = await chat.ainvoke(PROMPT)
    equal("".join([chunk.text async for chunk in chat.astream(PROMPT)]), whole.text)
    many = await chat.abatch([PROMPT] * 4)
    equal([each.text for each in many], [whole.text] * 4)


@check
def chain() -> None:
    """a chain: prompt template, model, parser"""
    made = ChatPromptTemplate.from_messages([("user", "Write a review of a {thing}.")]) | chat | StrOutputParser()
    true(isinstance(made.invoke({"thing": "film"}), str))
    equal(len(made.batch([{"thing": "film"}, {"thing": "book"}])), 2)


@check
def guided() -> None:
    """ChatOpenAI: guidance and diffusion in extra_body"""
    body = {"guidance": {"method": "aps", "reward_model": REWARD}, "best_of": 2, "diffusion": {"steps": 8}}
    true(isinstance(ChatOpenAI(**SERVER, max_tokens=16, extra_body=body).invoke(PROMPT).text, str))
    wrong = ChatOpenAI(**SERVER, extra_body={"guidance": {"method": "bon", "eta": 1}})
    equal(raises(openai.BadRequestError, lambda: wrong.invoke(PROMPT)).param, "guidance.eta")


@check
def completion() -> None:
    """OpenAI (completions): invoke, generate, stream"""
    model = OpenAI(**SERVER, max_tokens=16, seed=1, temperature=0.5)
    text = model.invoke(PROMPT)
    equal("".join(model.stream(PROMPT)), text)
    made = model.generate([PROMPT, "Another."], stop=["."])
    equal(len(made.generations), 2)
    true(all("." not in each[0].text for each in made.generations))


@check
def errors() -> None:
    """errors: unknown model, tools refused by name"""
    missing = ChatOpenAI(**{**SERVER, "model": "gpt-4o"})
    equal(raises(openai.NotFoundError, lambda: missing.invoke(PROMPT)).code, "model_not_found")
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    equal(raises(openai.BadRequestError, lambda: chat.bind_tools([tool]).invoke(PROMPT)).param, "tools")


main("langchain-openai")
