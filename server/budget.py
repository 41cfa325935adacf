"""What memory bounds in a denoising step, and what one trajectory takes of it. The HTTP process refuses by these what
could never run; the worker admits and cuts its steps by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import InvalidRequest

if TYPE_CHECKING:
    from server.types import Job


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes that memory bounds: of what shares a denoising step, or of one trajectory alone.

    tokens: canvas tokens in one forward of the diffusion model; classifier-free guidance counts them twice.
    guided_rows: rows of logits (masked positions) that are steered at once; each costs V numbers several times over
        (`steered_rows`).
    trajectories: those that run at the same time.
    logit_rows: rows of logits, V numbers each, that are drawn from without guidance at once.
    reward_tokens: tokens in one pass of a reward model, forward and back. A token of the cached conversation counts for
        as much of one as it costs.
    cached_tokens: tokens of running jobs whose keys and values are kept: conversations by the reward models, prompts
        and finished blocks by a block-causal diffusion model.
    """

    tokens: int = 16_384
    guided_rows: int = 8_192
    trajectories: int = 256
    logit_rows: int = 16_384
    reward_tokens: int = 65_536
    cached_tokens: int = 1_048_576


def steered_rows(rows: int, gradient_steps: int) -> int:
    """What so many rows count as with M = `gradient_steps`: with more than 3 Adam's state takes a tensor more."""
    return rows if gradient_steps <= 3 else (8 * rows + 4) // 5


@dataclass(frozen=True, slots=True)
class Cost:
    """What one trajectory of a job takes (see `Budget` for the units). `cached_tokens` are the conversation's and the
    prompt's, which the job's trajectories share for as long as it runs; `grown_tokens` those of its own answer, cached
    beside them."""

    tokens: int
    guided_rows: int = 0
    logit_rows: int = 0
    reward_tokens: int = 0
    cached_tokens: int = 0
    grown_tokens: int = 0

    @classmethod
    def of(cls, job: Job, *, reward_tokens: int = 0, cached_tokens: int = 0, grown_tokens: int = 0) -> Cost:
        """The cost of each trajectory of `job`; what its reward models take must be told."""
        forwards = 2 if job.diffusion.cfg_scale else 1
        prompt, rows, block = len(job.prompt_ids), job.sampling.max_tokens, job.diffusion.block_length
        canvas = prompt + rows + len(job.suffix_ids)
        if not job.reads_rewards:
            reward_tokens = cached_tokens = grown_tokens = 0
        if job.diffusion.block_causal and block is not None:
            # At most the block before and the current one are in a forward; all before them is cached.
            cached_tokens, grown_tokens = cached_tokens + prompt, grown_tokens + rows
            canvas, rows = block + min(block, rows), block if job.diffusion.blocks_from == "start" else min(block, rows)
        rows *= forwards
        steered = (steered_rows(rows, job.guidance.gradient_steps), 0) if job.reads_rewards else (0, rows)
        return cls(canvas * forwards, *steered, reward_tokens, cached_tokens, grown_tokens)

    def check(self, largest: Budget) -> None:
        """Raises InvalidRequest when one trajectory alone takes more than `largest`, and so could never run."""
        for taken, limit, what, param in (
            (self.tokens, largest.tokens, "canvas tokens", "max_tokens"),
            (self.guided_rows, largest.guided_rows, "guided rows of logits", "max_tokens"),
            (self.logit_rows, largest.logit_rows, "rows of logits", "max_tokens"),
            (self.reward_tokens, largest.reward_tokens, "reward-model tokens", "max_tokens"),
            (self.cached_tokens + self.grown_tokens, largest.cached_tokens, "cached tokens", "messages"),
        ):
            if taken > limit:
                raise InvalidRequest(
                    f"one trajectory takes {taken} {what}, more than the {limit} that a denoising step of this server "
                    "can hold",
                    param=param,
                )

    def check_together(self, shared: Budget, count: int) -> None:
        """Raises InvalidRequest when `count` trajectories that must run together, as those do that are resampled, take
        more than `shared`, and so could never begin."""
        for taken, limit, what in (
            (count, shared.trajectories, "trajectories"),
            (count * self.tokens, shared.tokens, "canvas tokens"),
            (self.cached_tokens + count * self.grown_tokens, shared.cached_tokens, "cached tokens"),
        ):
            if taken > limit:
                raise InvalidRequest(
                    f"{count} trajectories that are resampled run together and take {taken} {what}, more than the "
                    f"{limit} that may run at once on this server",
                    param="best_of",
                )
