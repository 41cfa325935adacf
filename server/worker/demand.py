"""What a job asks of the models before its first step: whether it can run at all, what each of its trajectories takes
of the budgets, and what its reward models read around the response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from server.budget import Cost
from server.errors import InvalidRequest, quote
from server.guidance.prefixes import RewardContext
from server.models.loading import LoadedDiffusionModel
from server.rewards.reward_model import RewardModel
from server.rewards.text_reward import TextReward
from server.text.template import split_at_response
from server.types import Job
from server.worker.memory import cached_share
from server.worker.savings import Savings

if TYPE_CHECKING:
    from server.worker.book import Entry

Reward = TypeVar("Reward", bound=TextReward)


def named(name: str, reward_models: Mapping[str, Reward], param: str) -> Reward:
    """The reward model of a name. Raises InvalidRequest, which blames `param`, where there is none."""
    if name not in reward_models:
        loaded = ", ".join(sorted(reward_models)) or "none"
        raise InvalidRequest(f"reward model {quote(name)} is not loaded; loaded: {loaded}", param)
    return reward_models[name]


def _check_context(model: TextReward, tokens: int) -> None:
    """Raises InvalidRequest where a reward would read more tokens than it can."""
    if tokens <= model.info.context_length:
        return
    what, param = f"conversation and response take {tokens} tokens", "messages"
    if model.info.input == "response":
        what, param = f"`max_tokens` and what stands around the response are {tokens} tokens", "max_tokens"
    limit = f"the context of reward model {model.info.id!r} is {model.info.context_length}"
    raise InvalidRequest(f"{what}; {limit}", param)


class Demand:
    """Of any job, with these models."""

    def __init__(
        self,
        loaded: LoadedDiffusionModel,
        reward_models: Mapping[str, RewardModel],
        savings: Savings,
        scorers: Mapping[str, TextReward],
    ) -> None:
        self.model, self.info, self.reward_models, self.savings = loaded.model, loaded.info, reward_models, savings
        self.scorers = scorers

    def cost(self, job: Job) -> Cost:
        """What a trajectory of the job takes. Raises InvalidRequest for what could only fail later: a reward model that
        is not loaded, a prompt or a conversation too long for its model."""
        canvas = len(job.prompt_ids) + job.sampling.max_tokens + len(job.suffix_ids)
        if canvas > self.info.context_length:
            raise InvalidRequest(
                f"prompt, suffix and max_tokens take {canvas} tokens; the context is {self.info.context_length}",
                param="max_tokens",
            )
        passed = cached = 0
        for weighted in job.guidance.reward_models:
            model = named(weighted.model, self.reward_models, "guidance.reward_model")
            before, after = split_at_response(
                model.tokenizer, job.conversation, job.response_suffix, job.response_prefix
            )
            tokens = len(before) + job.sampling.max_tokens + len(after)
            _check_context(model, tokens)
            kept = len(before) if self.savings.reward_prefix_cache else 0
            passed = max(passed, tokens - kept + math.ceil(kept * cached_share(model)))
            cached += kept
        for weighted in job.guidance.scorers:
            if (scorer := self.scorers.get(weighted.model)) is not None:  # else it is asked outside
                # Of the response as many tokens as the canvas has: the scorer's own count is known at the end only.
                _check_context(scorer, len(scorer.sequence(job.conversation, job.whole(""))) + job.sampling.max_tokens)
        grows = self.savings.reward_prefix_cache and self.savings.grow_reward_prefix
        grown = job.sampling.max_tokens * len(job.guidance.reward_models) if grows else 0
        return Cost.of(job, reward_tokens=passed, cached_tokens=cached, grown_tokens=grown)

    def prepare(self, entries: Sequence[Entry]) -> None:
        """Give jobs what stands in front of their responses, for all of their trajectories and steps: keys and values
        of conversations in reward models, and of prompts where attention is block-causal; all jobs' in one pass. The
        trajectories of a job that was parked get back what they had of their own blocks."""
        for entry, contexts in zip(entries, self.contexts([entry.job for entry in entries]), strict=True):
            entry.contexts = contexts
        kept = [entry for entry in entries if self.savings.block_cache and entry.job.diffusion.block_causal]
        continued = [each for entry in kept for each in entry.running.values() or [entry]]
        tokens = [each.settled for each in continued]
        lengths = [each.job.diffusion.block_length or 1 for each in continued]
        prefixes = self.model.prefill(tokens, lengths, [each.adapter for each in continued]) if kept else []
        for each, prefix in zip(continued, prefixes, strict=True):
            each.prefix = prefix

    def contexts(self, jobs: Sequence[Job]) -> list[dict[str, RewardContext]]:
        """What each reward model reads around the response of each job whose canvas it reads, by name."""
        found: list[dict[str, RewardContext]] = [{} for _ in jobs]
        for name, model in self.reward_models.items():
            reads = [
                (of, job)
                for of, job in zip(found, jobs, strict=True)
                if job.reads_rewards and any(weighted.model == name for weighted in job.guidance.reward_models)
            ]
            around = [
                split_at_response(model.tokenizer, job.conversation, job.response_suffix, job.response_prefix)
                for _, job in reads
            ]
            contexts = RewardContext.of(model, around, cached=self.savings.reward_prefix_cache)
            for (of, _), context in zip(reads, contexts, strict=True):
                of[name] = context
        return found
