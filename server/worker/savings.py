"""Exact savings, each of which can be turned off by name: to measure what it is worth and to test that it is exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from server.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Savings:
    """All on by default. None of them changes a token.

    share_equal_canvases: one forward for the K trajectories of a prompt at their first step, and for equal prompts.
    skip_empty_steps: a step that reveals nothing changes nothing.
    head_on_masked_rows: the LM head runs on masked positions only.
    reward_prefix_cache: the conversation before the response goes through the reward model once a job.
    grow_reward_prefix: so does the answer's own beginning, as it is settled; needs `reward_prefix_cache`.
    share_inner_steps: requests of different M go through their inner steps together; those of smaller M leave early.
    leave_when_final: a trajectory whose text can no longer change leaves, unless more of it is asked for. (One that is
        resampled stays: it may be copied over.)
    block_cache: with block-causal attention the prompt and every finished block go through the diffusion model once.
    """

    share_equal_canvases: bool = True
    skip_empty_steps: bool = True
    head_on_masked_rows: bool = True
    reward_prefix_cache: bool = True
    grow_reward_prefix: bool = True
    share_inner_steps: bool = True
    leave_when_final: bool = True
    block_cache: bool = True

    @classmethod
    def without(cls, names: Iterable[str]) -> Savings:
        """All savings but the named ones. Raises ConfigurationError for an unknown name, with the known ones."""
        known = [field.name for field in fields(cls)]
        for name in names:
            if name not in known:
                raise ConfigurationError(f"disable_savings: unknown name {name!r}; known: {', '.join(known)}")
        return replace(cls(), **dict.fromkeys(names, False))
