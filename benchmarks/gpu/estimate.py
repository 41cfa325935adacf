"""What a guided step costs on a GPU by its operations, bytes and launches: an estimate, not a measurement.

    python -m benchmarks.gpu.estimate [--reward 1.7B] [--launches 300]

A phase takes the longer of its arithmetic and its memory traffic, at the share of the device's peak that large
products and copies reach in practice (`REACHED`); the limit is the same at the peak itself. The host's launches go on
beside the device's work, so a step takes the longer of both. `make gpu-check` measures the same steps. Prints a table
and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console

from benchmarks.flops import (
    Decoder,
    diffusion_attention,
    reward_backward,
    reward_forward,
    vocabulary_product,
)
from benchmarks.gpu.models import DREAM, REWARDS
from benchmarks.report import table
from server.models.layers import DecoderConfig
from server.types import DecoderShape

FLOPS, BYTES = 989e12, 3.35e12
"""A second, of an H100 SXM: dense bfloat16, and its memory."""
REACHED = 0.65, 0.85
"""Of these, what large products and copies reach."""
LAUNCH = 5e-6
"""Seconds of the host for one launch."""
PROMPT, CONVERSATION, LENGTH, M = 80, 90, 128, 3
"""Tokens of a prompt and of a cached conversation; L = T; gradient steps."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of the mean step of a run by phase, at what is reached and at the peak; and of the host."""

    trajectories: int
    reached: dict[str, float]
    limit: dict[str, float]
    host: float

    @property
    def tokens_per_s(self) -> float:
        """One token of each trajectory a step."""
        return self.trajectories / max(sum(self.reached.values()), self.host)

    @property
    def limit_tokens_per_s(self) -> float:
        """At the device's peak, launches for nothing."""
        return self.trajectories / sum(self.limit.values())


@dataclass(frozen=True, slots=True)
class Canvas:
    """A trajectory in a step: the tokens of its prompt and response, how many are masked, how many a reward model has
    cached in front and reads anew, and M, 0 where nothing steers. One that is `shared` equals another of the batch,
    whose forward serves both."""

    length: int
    masked: int
    prefix: int = 0
    own: int = 0
    gradient_steps: int = 0
    shared: bool = False


def work(dream: Decoder, judge: Decoder, vocab_size: int, canvases: Sequence[Canvas]) -> dict[str, tuple[float, float]]:
    """(operations, bytes) by phase of a step of these. Weights are in two bytes, and so are activations, which only the
    vocabulary's passes move in large amounts."""
    alone = [canvas for canvas in canvases if not canvas.shared]
    lengths, read = [canvas.length for canvas in alone], [canvas.masked for canvas in alone]
    forward = dream.products(sum(lengths), sum(read)) + diffusion_attention(dream, lengths, read)
    head = vocabulary_product(sum(read), vocab_size, dream.hidden)
    passes, products, moved = 0.0, 0.0, 2.0 * vocab_size * sum(canvas.masked for canvas in canvases)
    most = max((canvas.gradient_steps for canvas in canvases), default=0)
    moved += 4 * most * vocab_size * judge.hidden
    for count in {canvas.gradient_steps for canvas in canvases} - {0}:
        guided = [canvas for canvas in canvases if canvas.gradient_steps == count]
        prefixes, owns = [canvas.prefix for canvas in guided], [canvas.own for canvas in guided]
        passes += count * (reward_forward(judge, prefixes, owns) + reward_backward(judge, prefixes, owns))
        rows = sum(canvas.masked for canvas in guided)
        products += 2 * count * vocabulary_product(rows, vocab_size, judge.hidden)
        # A draw, a mix and an update read phi (logits and up to two gradients); an update writes one.
        matrix = rows * vocab_size
        moved += sum(3 * matrix * (2 + 4 * min(done, 2)) + 4 * matrix for done in range(count))
    return {
        "diffusion model": (forward, _weights(dream)),
        "LM head": (head, 2 * vocab_size * dream.hidden + 2 * vocab_size * sum(read)),
        "reward passes": (passes, 2 * most * _weights(judge)),
        "vocabulary": (products, moved),
    }


def seconds(
    work: dict[str, tuple[float, float]], flops: float = FLOPS * REACHED[0], bandwidth: float = BYTES * REACHED[1]
) -> dict[str, float]:
    """Of an H100 by phase: the longer of arithmetic and traffic, by default at what is reached in practice."""
    return {phase: max(operations / flops, moved / bandwidth) for phase, (operations, moved) in work.items()}


def _weights(decoder: Decoder) -> float:
    """Bytes of the blocks' weights: a token's products read each number of them once, in two operations."""
    return float(decoder.products(1, 1))


def estimate(
    config: DecoderConfig,
    reward: DecoderShape,
    trajectories: int,
    launches: int = 300,
    masked: Sequence[int] = range(1, LENGTH + 1),
) -> Estimate:
    """The mean over steps in which so many positions of each trajectory are masked: by default over a whole run, in
    which every step reveals one token of each."""
    reached: dict[str, float] = {}
    limit: dict[str, float] = {}
    dream, judge = Decoder.of(config), Decoder.of(reward)
    for left in masked:
        # Revealed positions in front are in the cached prefix; on average as many stand behind the first masked one.
        own = left + (LENGTH - left) // 2
        canvas = Canvas(PROMPT + LENGTH, left, CONVERSATION + LENGTH - own, own, M)
        needed = work(dream, judge, config.vocab_size, [canvas] * trajectories)
        for total, found in ((reached, seconds(needed)), (limit, seconds(needed, FLOPS, BYTES))):
            for phase, spent in found.items():
                total[phase] = total.get(phase, 0.0) + spent / len(masked)
    return Estimate(trajectories, reached, limit, launches * LAUNCH)


def main() -> None:
    """Print the estimates for 4, 16 and 64 trajectories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=REWARDS, default="1.7B")
    parser.add_argument("--launches", type=int, default=300, help="of the host in one step")
    options = parser.parse_args()
    found = [estimate(DREAM, REWARDS[options.reward], count, options.launches) for count in (4, 16, 64)]
    rows = [
        {"trajectories": each.trajectories}
        | {f"{phase} ms": 1e3 * seconds for phase, seconds in each.reached.items()}
        | {"host ms": 1e3 * each.host, "tokens/s": each.tokens_per_s, "limit": each.limit_tokens_per_s}
        for each in found
    ]
    title = f"ESTIMATE, H100: Dream-7B and a reward model of {options.reward}, M = 3, L = T = 128"
    Console(width=140).print(table(title, rows))
    print(json.dumps([asdict(each) | {"tokens_per_s": each.tokens_per_s} for each in found]))


if __name__ == "__main__":
    main()
