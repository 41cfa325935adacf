"""What a request may ask of resampling and of rewards without a gradient: what the engine gets, and what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from server.budget import Budget
from server.types import (
    EngineInfo,
    GuidanceParams,
    Job,
    JobResult,
    Resampling,
    RewardModelInfo,
    TrajectoryResult,
    WeightedReward,
)
from server.wire.messages import Canvas, Event, Finished, Started
from tests.api.scripted_engine import INFO, ScriptedEngine, at_once, check_envelope, make, open_client

if TYPE_CHECKING:
    from tests.support.serving import Served

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
(RM,) = INFO.reward_models
NUMBERS = RewardModelInfo("numbers", "bert", 128, 1.0, "unk", "float32", 500, gradient=False)
MIXED = replace(INFO, reward_models=(NUMBERS, RM))
BY_NUMBERS = WeightedReward("numbers")


async def refused(body: dict[str, Any], info: EngineInfo) -> tuple[str | None, str]:
    """The field that a 400 names, and its message, which names it too."""
    async with open_client(make(ScriptedEngine(at_once, info=info))) as client:
        error = check_envelope(await client.post(COMPLETIONS, json={"prompt": "Hi", **body}), 400)
    assert f"`{error['param']}`" in error["message"]
    return error["param"], error["message"]


async def guidance_of(guidance: object, info: EngineInfo = INFO, **fields: Any) -> GuidanceParams:
    """What the engine is asked for."""
    engine = ScriptedEngine(at_once, info=info)
    async with open_client(make(engine)) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "Hi", "guidance": guidance, **fields})
    assert answer.status_code == 200, answer.text
    return engine.jobs[0].guidance


async def test_the_shorthand_is_best_of_n_that_resamples_by_reward() -> None:
    expected = GuidanceParams("bon", (WeightedReward("rm"),), resample=Resampling())
    for same in ("smc", {"method": "bon", "resample": {"by": "reward"}}, {"method": "bon", "resample": {}}):
        assert await guidance_of(same) == expected
    assert (await guidance_of({"method": "entrgi", "resample": None})).resample is None
    asked = {"by": "reward", "every": 3, "strength": 0.5, "potential": "max", "threshold": 1.0}
    found = await guidance_of({"method": "entrgi", "resample": asked})
    assert found.resample == Resampling("reward", 3, 0.5, "max", 1.0)


@pytest.mark.parametrize(
    ("guidance", "rewards"),
    [
        ({"method": "none", "resample": {}}, ["rm"]),
        ({"method": "none", "resample": {"by": "confidence"}}, []),
        ({"method": "bon", "resample": {"by": "confidence"}}, []),
        ({"method": "bon", "reward_model": "rm", "resample": {"by": "confidence"}}, ["rm"]),
        ({"method": "aps", "resample": {"by": "confidence"}}, ["rm"]),
        ("none", []),
    ],
)
async def test_who_rewards_where_nobody_is_named(guidance: Any, rewards: list[str]) -> None:
    n = 4 if "none" in (guidance, *guidance) or guidance["method"] == "none" else 1
    found = await guidance_of(guidance, n=n)
    assert [reward.model for reward in found.rewards] == rewards


async def test_without_a_reward_model_confidence_alone_resamples() -> None:
    nobody = replace(INFO, reward_models=())
    assert (await guidance_of({"method": "bon", "resample": {"by": "confidence"}}, nobody)).rewards == ()
    for guidance in ("bon", "smc", "entrgi", {"method": "none", "resample": {}}):
        param, message = await refused({"n": 2, "guidance": guidance}, nobody)
        assert param == "guidance"
        assert "none is loaded" in message


async def test_copies_of_random_positions_differ_without_a_temperature() -> None:
    for diffusion in ({"algorithm_temperature": 0.5}, {"algorithm": "origin"}):
        assert (await guidance_of("smc", temperature=0, diffusion=diffusion)).resample == Resampling()


async def test_gradients_come_from_those_that_have_one() -> None:
    steering, listening = (WeightedReward("rm", 2.0),), (WeightedReward("numbers", 0.5),)
    both = [{"model": "numbers", "weight": 0.5}, {"model": "rm", "weight": 2.0}]
    found = await guidance_of({"method": "entrgi", "reward_models": both}, MIXED)
    assert (found.reward_models, found.scorers) == (steering, listening)
    assert (await guidance_of("entrgi", MIXED)).rewards == (WeightedReward("rm"),)
    for guidance in ("bon", "smc", {"method": "none", "reward_model": "numbers"}):
        found = await guidance_of(guidance, MIXED)
        assert (found.reward_models, found.scorers) == ((), (BY_NUMBERS,))
    named: dict[str, Any] = {"reward_model": "numbers", "reward_models": [{"model": "numbers"}]}
    for field, value in named.items():
        param, message = await refused({"guidance": {"method": "entrgi", field: value}}, MIXED)
        assert param == f"guidance.{field}"
        assert "needs a reward model with a gradient, and none of numbers has one" in message


async def test_a_server_of_scorers_alone_refuses_gradients() -> None:
    info = replace(INFO, reward_models=(NUMBERS,))
    param, message = await refused({"guidance": "entrgi"}, info)
    assert param == "guidance"
    assert "with a gradient" in message
    async with open_client(make(ScriptedEngine(at_once, info=info))) as client:
        (model, _) = (await client.get("/v1/models")).json()["data"]
    assert model["guidance_methods"] == ["none", "bon"]


async def copied(job: Job) -> AsyncIterator[Event]:
    """Trajectory 1 becomes a copy of 0 after 8 steps; the second scorer did not answer in time."""
    yield Started(job.id)
    yield Canvas(job.id, 1, 8, [43, -1], [None, 0.5], None, 0)
    trajectories = tuple(
        TrajectoryResult(index, (43, 76), "Hi", "length", 2, rewards={"rm": 1.0, "numbers": None}, reward_calls=1)
        for index in (0, 1)
    )
    weights = None if job.prompt_index else (0.25, 0.75)
    chosen = (1, 0)[: job.sampling.n]
    yield Finished(job.id, JobResult(trajectories, chosen, 16, 0.1, 1.0, ((8, (0, 0)),), weights))


BOTH = {"method": "bon", "reward_models": [{"model": "rm"}, {"model": "numbers"}], "resample": {"every": 8}}
TOLD = {"without_gradient": ["numbers"], "resampled": [[[8, [0, 0]]]], "weights": [[0.25, 0.75]]}


async def post(
    path: str, body: dict[str, Any], script: Callable[[Job], AsyncIterator[Event]] = copied
) -> httpx.Response:
    async with open_client(make(ScriptedEngine(script, info=MIXED))) as client:
        answer = await client.post(path, json={"best_of": 2, "guidance": BOTH, **body})
        assert answer.status_code == 200, answer.text
        return answer


def sent(answer: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events, of either kind."""
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hi"}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
        (RESPONSES, {"input": "Hi"}),
    ],
)
async def test_an_answer_tells_who_was_copied_and_how_the_trajectories_weigh(path: str, body: dict[str, Any]) -> None:
    report = (await post(path, body)).json()["guidance"]
    assert TOLD.items() <= report.items()
    assert report["rewards"] == [[None, None]]
    assert report["rewards_by_model"] == {"rm": [[1.0, 1.0]], "numbers": [[None, None]]}
    assert report["reward_calls_total"] == 4  # one of each trajectory's steps, and the final score that came
    canvas, answered = False, False
    for event in sent(await post(path, {**body, "stream": True, "stream_canvas": True})):
        canvas |= event.get("canvas", {}).get("ancestor") == 0
        told = event.get("guidance") or event.get("response", {}).get("guidance")
        answered |= told is not None and TOLD.items() <= told.items()
    assert canvas
    assert answered


async def test_prompts_are_told_apart_and_a_missing_reward_leaves_no_weights() -> None:
    report = (await post(COMPLETIONS, {"prompt": ["Hi", "Ho"]})).json()["guidance"]
    assert report["resampled"] == [[[8, [0, 0]]]] * 2
    assert report["weights"] == [[0.25, 0.75], None]


async def test_a_request_that_does_not_resample_says_nothing_of_it() -> None:
    report = (await post(COMPLETIONS, {"prompt": "Hi", "guidance": "bon"}, at_once)).json()["guidance"]
    assert not {"resampled", "weights"} & report.keys()
    report = (await post(COMPLETIONS, {"prompt": "Hi", "guidance": {"method": "entrgi"}}, at_once)).json()["guidance"]
    assert "without_gradient" not in report


async def test_no_text_is_streamed_before_the_end() -> None:
    engine = ScriptedEngine(copied, info=MIXED)
    async with open_client(make(engine)) as client:
        body = {"prompt": "Hi", "n": 2, "stream": True, "guidance": {"resample": {}}}
        answer = await client.post(COMPLETIONS, json=body)
    texts = [choice["text"] for event in sent(answer) for choice in event["choices"]]
    assert engine.jobs[0].stream_tokens is False
    assert "".join(texts) == "HiHi"


async def test_trajectories_that_could_never_run_together_are_refused() -> None:
    """Each of them alone would fit."""
    info = replace(INFO, shared=Budget(trajectories=3))
    async with open_client(make(ScriptedEngine(at_once, info=info))) as client:
        for guidance, status in (("bon", 200), ("smc", 400)):
            answer = await client.post(COMPLETIONS, json={"prompt": "Hi", "guidance": guidance, "best_of": 4})
            assert answer.status_code == status, answer.text
    error = check_envelope(answer, 400)
    assert error["param"] == "best_of"
    assert "more than the 3 that may run at once" in error["message"]


# -- on a real server --------------------------------------------------------------------------------------------

ASKED = {"prompt": "Tell me", "max_tokens": 16, "seed": 5, "best_of": 4, "diffusion": {"schedule": "even"}}
"""A token in each step, so that steps taken are steps of the run."""
EAGER = {"every": 2, "strength": 100.0, "threshold": 1.0}
"""So that trajectories are copied at nearly every meeting."""


def ran(server: Served, **fields: Any) -> dict[str, Any]:
    answer = server.post(COMPLETIONS, {**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


@pytest.mark.parametrize("method", ["none", "bon", "entrgi"])
@pytest.mark.parametrize("by", ["reward", "confidence"])
def test_every_method_resamples(server: Served, method: str, by: str) -> None:
    guidance = {"method": method, "resample": {"by": by, **EAGER}}
    count = 4 if method == "none" else 2
    copied, met = server.metric("resamplings_total"), server.metric("effective_share_count")
    answer = ran(server, n=count, guidance=guidance, trace=True)
    report, (trace,) = answer["guidance"], answer["trace"]
    (meetings,), (weights,), (rewards,) = report["resampled"], report["weights"], report["rewards"]
    assert meetings
    assert all(step % 2 == 0 and 0 < step < 16 for step, _ in meetings)
    assert sum(weights) == pytest.approx(1)
    assert server.metric("resamplings_total") == copied + len(meetings)
    assert server.metric("effective_share_count") >= met + len(meetings)
    for trajectory, steps in enumerate(trace):
        marked = {each["step"] + 1: each for each in steps if each["ancestor"] is not None}
        assert all(isinstance(each["reward_estimate"], float) for each in marked.values())
        last, ancestors = meetings[-1]
        assert marked[last]["ancestor"] == ancestors[trajectory]
    chosen = [choice["trajectory"] for choice in answer["choices"]]
    if method == "none":
        assert chosen == [0, 1, 2, 3]
    elif method == "bon" and by == "confidence":
        assert rewards == [None] * 4
        assert [choice["reward"] for choice in answer["choices"]] == [None, None]
    else:
        assert chosen == sorted(range(4), key=lambda index: -rewards[index])[:2]


def test_a_stream_gives_the_same_answer_and_tells_whose_copy_each_canvas_is(server: Served) -> None:
    guidance = {"method": "bon", "resample": EAGER}
    whole = ran(server, guidance=guidance)
    chunks = server.stream(COMPLETIONS, {**ASKED, "guidance": guidance, "stream_canvas": True})
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert chunks[-1]["guidance"]["resampled"] == whole["guidance"]["resampled"]
    canvases = [chunk["canvas"] for chunk in chunks if "canvas" in chunk]
    shown = {(each["trajectory"], each["step"]): each["ancestor"] for each in canvases}
    (meetings,) = whole["guidance"]["resampled"]
    copies = [
        (shown[trajectory, step], ancestor)
        for step, ancestors in meetings
        for trajectory, ancestor in enumerate(ancestors)
        if ancestor != trajectory
    ]
    assert copies
    assert all(told == ancestor for told, ancestor in copies)
