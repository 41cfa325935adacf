"""The schedule of a denoising run: how many positions each step reveals, known before the run starts.

The number of masked positions after every step follows from the schedule alone (only `origin` reveals a random
number), so the whole plan is made on the host once and no step ever asks the device how many tokens are masked.

`entropy_bound` and `threshold` choose the number themselves, at every step. For them the plan is the slowest pace:
each of its steps says how many positions may still be masked after it, and a run is over when none is.

With block-causal attention the blocks may begin inside the prompt and reach past the response: `lead` is the number of
prompt tokens in the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from server.types import DiffusionParams, GuidanceParams

EPS = 1e-3  # the end of time; Dream's generation code calls it `eps`


@dataclass(frozen=True, slots=True)
class Step:
    """One scheduled denoising step.

    `index` counts scheduled steps over the whole run, `time` is t in (0, 1], `start` and `stop` bound the block
    (response positions) in which positions may be revealed, `reveal` is k (for `origin`, which draws its positions, it
    is the number left at the last step of a block and 0 before; for the adaptive algorithms it is the least that they
    reveal: 1, with block-causal attention as many as any other would), `left` is how many positions of the block the
    schedule leaves masked after the step, `probability` is 1 - s/t, the chance with which `origin` reveals each masked
    position, and `gradient_steps` is M, 0 where no guidance runs.
    """

    index: int
    time: float
    start: int
    stop: int
    reveal: int
    left: int
    probability: float
    gradient_steps: int

    @property
    def guided(self) -> bool:
        """Whether gradient guidance runs here."""
        return self.gradient_steps > 0

    def least(self, masked: int) -> int:
        """The fewest of a block's `masked` positions that an adaptive algorithm reveals in this step, so that the run
        keeps to its schedule and never takes more than T steps."""
        return max(self.reveal, masked - self.left)


def time_grid(steps: int) -> list[float]:
    """T + 1 points from 1 down to eps, evenly spaced; built from both ends, as torch.linspace does."""
    delta = (EPS - 1.0) / steps
    half = (steps + 1) // 2
    return [1.0 + delta * i if i < half else EPS - delta * (steps - i) for i in range(steps + 1)]


def blocks(
    max_tokens: int, steps: int, block_length: int | None, lead: int = 0, *, whole: bool = False
) -> list[tuple[int, int, int]]:
    """(start, stop, steps) of each block of response positions: T // blocks steps, the first T % blocks one more, at
    least one each. Without a `lead` there are ceil(L / b); the last may be short, or is `whole` and reaches past L."""
    length = block_length or max_tokens
    starts = [0, *range(length - lead, max_tokens, length)]
    last = max_tokens + (-(lead + max_tokens) % length if whole else 0)
    share, extra = divmod(steps, len(starts))
    return [
        (start, stop, max(1, share + (index < extra))) for index, (start, stop) in enumerate(pairwise([*starts, last]))
    ]


def block_lengths(tokens: int, boundary: int, block_length: int) -> tuple[int, ...]:
    """The lengths of the blocks of a sequence of so many tokens, where one block ends at place `boundary` (which may be
    outside of it): `block_length` each, but the first and the last may be shorter."""
    ends = [*range(boundary % block_length or block_length, tokens, block_length), tokens]
    return tuple(end - start for start, end in pairwise([0, *ends]))


def gradient_steps(place: float, count: int, guidance: GuidanceParams) -> int:
    """M of a step, 0 where it is not guided. It is when its `place` in [0, 1) of the run lies in [start, stop), and
    `every` is a divisor of the `count` of steps before it."""
    inside = guidance.start <= place < guidance.stop and count % guidance.every == 0
    return guidance.inner_steps if inside else 0


def adapted(step: Step, masked: int, max_tokens: int, taken: int, guidance: GuidanceParams) -> Step:
    """A step of an adaptive run as it is met, after `taken` steps, with `masked` of `max_tokens` positions masked. The
    length of the run is not known yet, so the step's place in it is the share of positions revealed before it."""
    return replace(step, gradient_steps=gradient_steps((max_tokens - masked) / max_tokens, taken, guidance))


def plan(max_tokens: int, diffusion: DiffusionParams, guidance: GuidanceParams, lead: int = 0) -> tuple[Step, ...]:
    """Every scheduled step of a run, empty ones included (algorithm.md, section 1, points 6 and 'blocks'). For the
    adaptive algorithms `gradient_steps` is settled only when a step is met: see `adapted`."""
    whole = diffusion.blocks_from == "start"
    layout = blocks(max_tokens, diffusion.steps, diffusion.block_length, lead, whole=whole)
    total = sum(steps for _, _, steps in layout)
    planned: list[Step] = []
    for start, stop, steps in layout:
        grid = time_grid(steps)
        masked = stop - start
        share, extra = divmod(diffusion.block_length or masked if whole else masked, steps)
        for i in range(steps):
            last = i == steps - 1
            fraction = 1.0 - grid[i + 1] / grid[i]
            if last:
                reveal = masked
            elif diffusion.algorithm == "origin":
                reveal = 0
            elif diffusion.schedule == "even":
                reveal = min(masked, share + (i < extra))
            else:
                reveal = int(masked * fraction)
            masked -= reveal
            if diffusion.adaptive:
                reveal = max(1, reveal) if diffusion.block_causal else 1
            index = len(planned)
            planned.append(
                Step(
                    index,
                    grid[i],
                    start,
                    stop,
                    reveal,
                    masked,
                    1.0 if last else fraction,
                    gradient_steps(index / total, index, guidance),
                )
            )
    return tuple(planned)
