"""Completions and chat completions on a real server: shapes, defaults, choices, seeds, and what each field does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.serving import GOLDEN, Served

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REWARD = GOLDEN / "dream-tiny" / "rm"


def ok(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def complete(server: Served, **fields: Any) -> dict[str, Any]:
    return ok(server.post(COMPLETIONS, {"prompt": "Tell me", "max_tokens": 8, "seed": 11, **fields}))


def chat(server: Served, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 8, "seed": 11, **fields}
    return ok(server.post(CHAT, body))


def test_completion_shape(server: Served) -> None:
    answer = complete(server, guidance="entrgi")
    assert (answer["object"], answer["model"], answer["id"][:5]) == ("text_completion", "dlm", "cmpl-")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "trajectory", "text", "logprobs", "finish_reason", "stop_reason", "reward"}
    assert choice["logprobs"] is None
    report = answer["guidance"]
    expected = {"method": "entrgi", "reward_models": ["rm"], "seed": 11, "steps": 8}
    assert expected.items() <= report.items()
    assert 0 < report["model_calls"] <= 8
    assert report["reward_calls"] == 3 * report["model_calls"]
    assert report["model_calls_total"] == 4 * report["model_calls"]
    assert report["reward_calls_total"] == 4 * report["reward_calls"] + 4
    (rewards,) = report["rewards"]
    assert len(rewards) == 4
    assert choice["reward"] == max(rewards) == rewards[choice["trajectory"]]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["trajectory_tokens"] >= usage["completion_tokens"]


def test_chat_shape(server: Served) -> None:
    answer = chat(server)
    assert (answer["object"], answer["id"][:9]) == ("chat.completion", "chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert choice["reward"] is None
    assert {"method": "none", "reward_models": [], "rewards": [[None]]}.items() <= answer["guidance"].items()


def test_prompt_forms_agree(server: Served) -> None:
    """A text, its token ids, and lists of either are the same prompt."""
    tokens = server.post("/tokenize", {"prompt": "Tell me"}).json()["tokens"]
    fields = {"guidance": "entrgi", "best_of": 2, "return_token_ids": True}
    expected = complete(server, **fields)["choices"]
    for prompt in (["Tell me"], tokens, [tokens]):
        assert complete(server, **fields, prompt=prompt)["choices"] == expected


def test_several_prompts(server: Served) -> None:
    answer = complete(server, prompt=["Tell me", "Hello", "Hello"], n=2, best_of=3, guidance="bon")
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    rewards = answer["guidance"]["rewards"]
    assert [len(each) for each in rewards] == [3, 3, 3]
    for prompt, of_prompt in enumerate(rewards):
        best = sorted(of_prompt, reverse=True)[:2]
        assert [choice["reward"] for choice in answer["choices"][2 * prompt : 2 * prompt + 2]] == best
    assert rewards[1] != rewards[2]  # the prompt's index is in the key of its random numbers
    assert [rewards[i // 2][choice["trajectory"]] for i, choice in enumerate(answer["choices"])] == [
        choice["reward"] for choice in answer["choices"]
    ]
    counts = {"reward_calls": 0, "reward_calls_total": 9, "model_calls_total": 9 * answer["guidance"]["model_calls"]}
    assert counts.items() <= answer["guidance"].items()


def test_none_gives_choices_in_order(server: Served) -> None:
    answer = complete(server, n=3, guidance={"method": "none", "reward_model": "rm"})
    assert [choice["reward"] for choice in answer["choices"]] == answer["guidance"]["rewards"][0]
    first = complete(server, n=1)
    assert answer["choices"][0]["text"] == first["choices"][0]["text"]


def test_best_of_defaults(server: Served) -> None:
    asked: list[dict[str, Any]] = [{}, {"n": 5}, {"best_of": 1}, {"guidance": "none", "n": 2}]
    found = [complete(server, **{"guidance": "bon", **fields})["guidance"]["rewards"][0] for fields in asked]
    assert [len(rewards) for rewards in found] == [4, 5, 1, 2]


def test_nulls_and_values_that_ask_for_nothing(server: Served) -> None:
    plain = complete(server)["choices"]
    nulls = dict.fromkeys((
        "temperature", "top_p", "top_k", "n", "best_of", "stop", "stream", "stream_options", "logprobs", "echo",
        "logit_bias", "user", "suffix", "guidance", "diffusion", "timeout", "trace", "presence_penalty",
    ))  # fmt: skip
    nothing = {
        "n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0,
        "stop": [], "stream": False, "user": "u", "top_k": -1, "temperature": 0.7, "top_p": 0.95, "suffix": "",
        "repetition_penalty": 1.0, "min_p": 0, "store": False, "metadata": {"a": "b"}, "guidance": {"method": None},
    }  # fmt: skip
    assert complete(server, **nulls)["choices"] == plain
    assert complete(server, **nothing)["choices"] == plain
    spoken = chat(server)["choices"]
    chatty = {
        "max_completion_tokens": 8, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "logprobs": False, "top_logprobs": None, "modalities": ["text"], "service_tier": "auto",
        "parallel_tool_calls": True, "functions": None, "reasoning_effort": None,
    }  # fmt: skip
    assert chat(server, **chatty)["choices"] == spoken


def test_seed_reproduces_and_is_reported_when_drawn(server: Served) -> None:
    drawn = complete(server, seed=None, guidance="aps", best_of=2)
    again = complete(server, seed=drawn["guidance"]["seed"], guidance="aps", best_of=2)
    assert again["choices"] == drawn["choices"]
    other = complete(server, seed=None, guidance="aps", best_of=2)
    assert other["guidance"]["seed"] != drawn["guidance"]["seed"]
    assert complete(server, seed=-(2**63))["guidance"]["seed"] == -(2**63)


def test_each_prompt_may_have_a_seed_of_its_own(server: Served) -> None:
    prompts = ["Tell me", "Hello"]
    mixed = complete(server, prompt=prompts, seed=[11, 12])
    assert mixed["guidance"]["seed"] == [11, 12]
    first, second = (complete(server, prompt=prompts, seed=seed)["choices"] for seed in (11, 12))
    assert mixed["choices"] == [first[0], second[1]]


def test_token_ids_and_ignore_eos(server: Served) -> None:
    answer = complete(server, return_token_ids=True, ignore_eos=True, max_tokens=13)
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == 13
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 13
    decoded = server.post("/detokenize", {"tokens": choice["token_ids"]}).json()["prompt"]
    assert choice["text"] == re.sub(r"<\|\w+\|>", "", decoded)


def test_suffix_is_seen(server: Served) -> None:
    plain = complete(server, return_token_ids=True, temperature=0)
    filled = complete(server, suffix=" and so they lived.", return_token_ids=True, temperature=0)
    assert filled["choices"][0]["token_ids"] != plain["choices"][0]["token_ids"]
    assert filled["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    scored = complete(server, suffix=" and so they lived.", guidance={"method": "none", "reward_model": "rm"})
    (choice,) = scored["choices"]
    text = choice["text"] + " and so they lived."
    (score,) = server.post("/v1/score", {"queries": "Tell me", "documents": text}).json()["data"]
    assert choice["reward"] == pytest.approx(score["score"], abs=1e-4)


def test_chat_template_on_completions(server: Served) -> None:
    wrapped = complete(server, chat_template=True, return_token_ids=True)
    spoken = chat(server, return_token_ids=True)
    assert wrapped["choices"][0]["token_ids"] == spoken["choices"][0]["token_ids"]
    assert wrapped["usage"] == spoken["usage"]


def test_an_answer_goes_on_from_the_last_message(server: Served) -> None:
    """The prompt ends with it; for the reward model it begins the answer, which does not repeat it."""
    question, begun = {"role": "user", "content": "Tell me"}, "The film was "
    asked = {"messages": [question, {"role": "assistant", "content": begun}], "continue_final_message": True}
    tokens = ok(server.post("/tokenize", asked))["tokens"]
    theirs = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "dream-tiny" / "dlm")
    assert tokens == theirs.apply_chat_template(asked["messages"], continue_final_message=True, return_dict=False)
    (choice,) = chat(server, **asked, return_token_ids=True)["choices"]
    assert choice["token_ids"] == complete(server, prompt=tokens, return_token_ids=True)["choices"][0]["token_ids"]
    answer = chat(server, **asked, add_generation_prompt=False, guidance="entrgi")["choices"][0]
    text = answer["message"]["content"]
    (score,) = ok(server.post("/v1/score", {"queries": [question], "documents": begun + text}))["data"]
    assert answer["reward"] == pytest.approx(score["score"], abs=1e-4)
    unguided = chat(server, **asked, guidance={"method": "entrgi", "gradient_steps": 0})["choices"][0]
    assert answer["message"] != unguided["message"]


def test_what_this_template_does_not_write_changes_nothing(server: Served) -> None:
    plain = chat(server)["choices"]
    assert chat(server, messages=[{"role": "user", "content": "Tell me", "name": "Ann"}])["choices"] == plain
    assert chat(server, chat_template_kwargs={"enable_thinking": False})["choices"] == plain
    assert chat(server, add_generation_prompt=False)["choices"] != plain
    wrapped = complete(server, chat_template=True, chat_template_kwargs={"tone": "dry"})["choices"]
    assert wrapped[0]["text"] == plain[0]["message"]["content"]


def test_content_parts_and_developer_role(server: Served) -> None:
    def answer(messages: list[dict[str, Any]]) -> list[Any]:
        choices: list[Any] = chat(server, messages=messages, return_token_ids=True)["choices"]
        return choices

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert answer([{"role": "user", "content": parts}]) == answer([{"role": "user", "content": "one\ntwo"}])
    turn = {"role": "user", "content": "Hi"}
    spoken = [answer([{"role": role, "content": "Be brief"}, turn]) for role in ("developer", "system")]
    assert spoken[0] == spoken[1]


def test_weighted_rewards(server: Served) -> None:
    terms = [{"model": "rm", "weight": 2.0}, {"model": "other", "weight": -0.5}]
    answer = complete(server, guidance={"method": "entrgi", "reward_models": terms}, best_of=3)
    (choice,) = answer["choices"]
    assert answer["guidance"]["reward_models"] == ["rm", "other"]
    assert choice["reward"] == pytest.approx(2.0 * choice["rewards"]["rm"] - 0.5 * choice["rewards"]["other"])
    assert choice["reward"] == max(answer["guidance"]["rewards"][0])
    by_model = answer["guidance"]["rewards_by_model"]
    sums = [2.0 * ours - 0.5 * other for ours, other in zip(by_model["rm"][0], by_model["other"][0], strict=True)]
    assert sums == pytest.approx(answer["guidance"]["rewards"][0])
    assert {name: values[0][choice["trajectory"]] for name, values in by_model.items()} == choice["rewards"]


def test_step_map(server: Served) -> None:
    """It says of each token what the trace says of each step."""
    answer = complete(server, return_step_map=True, trace=True, diffusion={"steps": 5})
    (choice,), ((steps,),) = answer["choices"], answer["trace"]
    assert [choice["step_map"].count(step["step"]) for step in steps] == [step["revealed"] for step in steps]
    assert len(choice["step_map"]) == 8


def test_trace(server: Served) -> None:
    answer = complete(server, guidance={"method": "entrgi", "stop": 0.5}, best_of=2, trace=True, diffusion={"steps": 6})
    ((first, second),) = answer["trace"]
    for steps in (first, second):
        assert [step["step"] for step in steps] == list(range(6))
        assert sum(step["revealed"] for step in steps) == 8
        assert steps[0]["masked"] == 8
        guided = [step["mean_w"] is not None for step in steps if step["revealed"]]
        assert guided == sorted(guided, reverse=True)
        assert any(guided)
        assert not all(guided)
        assert all((step["reward_before"] is None) == (step["revealed"] == 0) for step in steps)


@pytest.mark.parametrize(
    ("algorithm", "field", "values", "default"),
    [("entropy_bound", "entropy_bound", (0, 3, 1000), 0.1), ("threshold", "confidence_threshold", (1, 0), 0.9)],
)
def test_adaptive_rules_from_one_token_a_step_to_all_at_once(
    server: Served, algorithm: str, field: str, values: tuple[float, ...], default: float
) -> None:
    rule = {"algorithm": algorithm, "deprioritize_eos": False}
    fields = {"guidance": "entrgi", "best_of": 2, "trace": True, "return_token_ids": True}
    steps = []
    for value in values:
        answer = complete(server, diffusion={**rule, field: value}, **fields)
        report = answer["guidance"]
        assert report["approximations"] == [algorithm]
        assert report["steps"] == report["model_calls"] == max(len(each) for each in answer["trace"][0])
        assert report["reward_calls"] == 4 * report["steps"]  # the trace reads once more
        for trajectory in answer["trace"][0]:
            assert sum(step["revealed"] for step in trajectory) == 8
            assert all(step["revealed"] >= 1 for step in trajectory)
        steps.append(report["steps"])
    most, *some, least = steps
    assert (most, least) == (8, 1)
    assert all(1 < each < 8 for each in some)
    explicit = complete(server, diffusion={**rule, field: default}, **fields)
    assert complete(server, diffusion=rule, **fields)["choices"] == explicit["choices"]


def test_steps_bound_an_adaptive_run(server: Served) -> None:
    for rule in ({"algorithm": "entropy_bound", "entropy_bound": 0}, {"algorithm": "threshold"}):
        answer = complete(server, diffusion={**rule, "steps": 3}, trace=True)
        assert answer["guidance"]["steps"] <= 3
        assert sum(step["revealed"] for step in answer["trace"][0][0]) == 8


@pytest.mark.parametrize(
    ("window", "named"),
    [
        ({"start": 0.0, "stop": 1.0, "every": 1}, []),
        ({"stop": 0.5, "every": 2}, ["guidance.stop", "guidance.every"]),
        # Of 8 steps for 8 tokens the first reveals nothing, so nothing is lost when it is not guided.
        ({"start": 0.1}, []),
        ({"gradient_steps": 0, "every": 2}, []),
    ],
)
def test_windows_that_leave_steps_unguided_are_named(server: Served, window: dict[str, Any], named: list[str]) -> None:
    answer = complete(server, guidance={"method": "entrgi", **window}, best_of=1, trace=True)
    assert answer["guidance"]["approximations"] == named
    unguided = [s for s in answer["trace"][0][0] if s["revealed"] and s["mean_w"] is None]
    assert bool(unguided) == bool(named) or window.get("gradient_steps") == 0


def test_deadline_while_running_returns_what_is_there(server: Served) -> None:
    slow = {"method": "entrgi", "gradient_steps": 16}
    answer = complete(server, max_tokens=512, guidance=slow, best_of=4, timeout=1.0, return_step_map=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["stop_reason"] == "deadline"
    assert answer["usage"]["completion_tokens"] < 512
    assert None in choice["step_map"]


def test_score_and_rerank_agree_with_bon(server: Served) -> None:
    answer = chat(server, guidance="bon", n=3, best_of=3)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    rewards = [choice["reward"] for choice in answer["choices"]]
    conversation = [{"role": "user", "content": "Tell me"}]
    scored, pairs = (
        ok(server.post("/v1/score", {"queries": asked, "documents": texts}))
        for asked in (conversation, ["Tell me"] * 3)
    )
    for found in (scored, pairs):
        assert [each["score"] for each in found["data"]] == pytest.approx(rewards, abs=1e-4)
    ranked = ok(server.post("/v1/rerank", {"query": "Tell me", "documents": texts[::-1], "top_n": 2}))
    assert len(ranked["results"]) == 2
    assert [each["relevance_score"] for each in ranked["results"]] == pytest.approx(rewards[:2], abs=1e-4)
    assert [each["document"]["text"] for each in ranked["results"]] == texts[:2]
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    read = 0
    for text in texts:
        whole = tokenizer.apply_chat_template([*conversation, {"role": "assistant", "content": text}], tokenize=False)
        read += len(tokenizer(whole, add_special_tokens=False).input_ids)
    for answer in (scored, pairs, ranked):
        assert answer["usage"] == {"prompt_tokens": read, "total_tokens": read}


def test_rerank_as_its_clients_call_it(server: Served) -> None:
    texts = ["The film was bad.", "The film was good.", "Yes"]
    documents = [texts[0], {"text": texts[1]}, {"text": texts[2]}]
    body = {"query": "Tell me", "documents": documents, "rank_fields": ["text"]}
    whole = ok(server.post("/v1/rerank", {"query": "Tell me", "documents": texts}))
    for path in ("/v2/rerank", "/rerank"):
        answer = ok(server.post(path, body))
        assert {**answer, "id": ""} == {**whole, "id": ""}
        assert all(each["document"] == {"text": texts[each["index"]]} for each in answer["results"])
        assert answer["meta"]["tokens"]["input_tokens"] == answer["usage"]["total_tokens"]
        bare = ok(server.post(path, {**body, "return_documents": False, "top_n": 2}))["results"]
        assert bare == [{key: each[key] for key in ("index", "relevance_score")} for each in answer["results"][:2]]
    strings = ok(server.post("/infinity/rerank", body))["results"]
    assert [each["document"] for each in strings] == [texts[each["index"]] for each in whole["results"]]


@pytest.mark.parametrize("temperature", [1e-45, 9e-7])
def test_a_temperature_of_nearly_nothing_is_zero(server: Served, temperature: float) -> None:
    fields = {"return_token_ids": True, "guidance": "entrgi", "best_of": 1, "max_tokens": 6}
    cold = complete(server, temperature=0, **fields)
    nearly = complete(server, temperature=temperature, diffusion={"algorithm_temperature": temperature}, **fields)
    assert nearly["choices"] == cold["choices"]


def test_tokenize_round_trip(server: Served) -> None:
    text = "Héllo <|im_end|> wörld"
    answer = ok(server.post("/tokenize", {"prompt": text, "return_token_strs": True}))
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert ok(server.post("/detokenize", {"tokens": answer["tokens"]}))["prompt"] == text


def test_metrics_count(server: Served) -> None:
    before = server.metric("guided_requests_total", method="expectation", reward_model="other")
    steps = server.metric("denoising_steps_total")
    complete(server, guidance={"method": "expectation", "reward_model": "other"}, best_of=2)
    assert server.metric("guided_requests_total", method="expectation", reward_model="other") == before + 1
    assert server.metric("denoising_steps_total") > steps
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
