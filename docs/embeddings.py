"""The cookbook's figure of what a reward model reads: soft, hard and mixed embeddings against entropy.

`python -m docs.embeddings` guides the bundled pair through the plain loop and keeps, of every masked position of every
step, the entropy H and the three embeddings: soft = q @ E, hard = E[x] of a drawn token x, and EntRGi's mixture
soft + w (hard - soft) with w = H / log V (docs/algorithm.md, section 2).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.plots import BLUE, GREEN, ORANGE, STYLE
from benchmarks.workload import Workload, load, only_first_trajectory
from demo import bundled_model_path, bundled_reward_models
from server.diffusion.schedule import Step
from server.guidance.distributions import draw, entropy, filtered_distribution
from server.guidance.plain import PlainLoop
from server.types import Job

OUT = Path(__file__).with_name("plots") / "embeddings.svg"
KINDS = (("soft", GREEN), ("hard", ORANGE), ("mixed", BLUE))
BINS = 12


@dataclass
class Seen:
    """Of N masked positions: entropies (N,) in nats, and by kind of embedding the distances to the nearest token's
    embedding and to the soft one, (N,) each, in units of the mean distance between two tokens."""

    entropies: list[Tensor] = field(default_factory=list)
    to_token: dict[str, list[Tensor]] = field(default_factory=lambda: {kind: [] for kind, _ in KINDS})
    to_soft: dict[str, list[Tensor]] = field(default_factory=lambda: {kind: [] for kind, _ in KINDS})


class WatchedLoop(PlainLoop):
    """The plain loop, which looks at the rows of each guided step before they are moved."""

    def watch(self, table: Tensor) -> Seen:
        """From now on, with the reward model's embeddings (V, D) by diffusion token."""
        self.table, self.seen = table.float(), Seen()
        self.unit = torch.pdist(self.table[:: max(1, len(table) // 500)]).mean()
        return self.seen

    def steer(self, job: Job, trajectory: int, step: Step, phi_0: Tensor, response: Tensor, rows: Tensor) -> Tensor:
        """What the loop does, after a look."""
        sampling, kinds = job.sampling, {}
        q, filtered = filtered_distribution(phi_0, sampling.temperature, sampling.top_p, sampling.top_k)
        drawn = draw(phi_0, q, filtered, self.keys(job, trajectory, step, 0, rows), greedy=False)
        kinds["soft"], kinds["hard"] = q @ self.table, self.table[drawn]
        h = entropy(phi_0)
        kinds["mixed"] = kinds["soft"].lerp(kinds["hard"], (h / np.log(phi_0.shape[-1]))[:, None])
        self.seen.entropies.append(h)
        for kind, e in kinds.items():
            self.seen.to_token[kind].append(torch.cdist(e, self.table).amin(-1) / self.unit)
            self.seen.to_soft[kind].append((e - kinds["soft"]).norm(dim=-1) / self.unit)
        return super().steer(job, trajectory, step, phi_0, response, rows)


def figure(seen: Seen) -> Figure:
    """Medians by entropy, and the middle 80% around them."""
    drawn = Figure(figsize=(7.6, 3.1), layout="constrained")
    panels = drawn.subplots(1, 2)
    entropies = torch.cat(seen.entropies).numpy()
    edges = np.linspace(0, entropies.max(), BINS + 1)
    place = np.clip(np.digitize(entropies, edges) - 1, 0, BINS - 1)
    bins = [place == each for each in range(BINS) if (place == each).sum() >= 20]
    x = [entropies[each].mean() for each in bins]
    titles = ("How unlike every token it is", "How far it is from where the gradient is taken")
    for axes, distances, title in zip(panels, (seen.to_token, seen.to_soft), titles, strict=True):
        for kind, colour in KINDS:
            low, middle, high = _quantiles(torch.cat(distances[kind]).numpy(), bins)
            axes.plot(x, middle, "o-", ms=3, color=colour, label=kind)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="entropy of the position, nats", title=title, ylim=(0, None))
    panels[0].set_ylabel("distance / mean distance of two tokens")
    panels[0].legend()
    return drawn


def _quantiles(
    values: npt.NDArray[np.float32], bins: Sequence[npt.NDArray[np.bool_]]
) -> tuple[list[float], list[float], list[float]]:
    low, middle, high = ([float(np.quantile(values[each], share)) for each in bins] for share in (0.1, 0.5, 0.9))
    return low, middle, high


def main() -> None:
    """Run, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m docs.embeddings", description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    given = parser.parse_args()
    pair = load(bundled_model_path(), bundled_reward_models()["sentiment"], torch.float32, torch.device("cpu"))
    plain = pair.plain
    loop = WatchedLoop(plain.model, plain.tokenizer, plain.info, plain.rewards)
    seen = loop.watch(plain.rewards["rm"].table)
    for job in Workload(prompts=given.prompts, max_tokens=48, steps=48, prompt_words=7).jobs(pair):
        loop.run(only_first_trajectory(job))
    with rc_context(STYLE):
        figure(seen).savefig(OUT, metadata={"Date": None})
    h = torch.cat(seen.entropies)
    w = float(h.mean()) / np.log(pair.loaded.info.vocab_size)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(h):,} positions, mean w {w:.3f}")


if __name__ == "__main__":
    main()
