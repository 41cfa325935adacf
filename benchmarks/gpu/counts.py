"""What a guided step of Dream-7B and a reward model of 1.7B launches, counted without a GPU.

    python -m benchmarks.gpu.counts [--trajectories 4] [--no-graphs] [--layers 28]

The engine's own step runs on a pretended GPU (`benchmarks.gpu.pretend`). Counted are kernels (an operator of torch or a
Triton kernel is one), host launches (a graph is one, however many kernels it has), uploads, waits, and the variants of
Triton kernels that a mixed load needs, before and after warm-up. Prints tables, then one JSON line. Needs triton. Exit
status 1 when a count is past its limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.gpu.models import DREAM, REWARDS, Texts, diffusion_model, reward_model
from benchmarks.gpu.pretend import DEVICE, MEMORY, Pretend, Tally
from benchmarks.report import CaseResult, Figure, show
from kernels import varlen
from kernels.dispatch import choose_products
from server.models.graphs import GraphedTrunk
from server.models.loading import LoadedDiffusionModel
from server.rewards.graphs import GraphedPasses
from server.rewards.reward_model import RewardModel
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.worker.memory import Footprint
from server.worker.runner import Runner
from server.worker.service import warm_up

LIMITS = {
    "kernels_per_step": 4000,
    "host_launches_per_step": 300,
    "uploads_per_step": 4,
    "waits_per_step": 1,
    "triton_variants_after_warmup": 0,
}
FORMS: tuple[dict[str, Any], ...] = (
    *({"algorithm": name} for name in ("maskgit_plus", "topk_margin", "origin", "threshold")),
    {"cfg_scale": 0.5},
    {"block_length": 32},
    {"algorithm_temperature": 0.5},
)
"""What a request may ask that chooses a kernel or its form."""
MEASURED_STEPS = 8
"""After the first two, which share canvases, run conversations and fill caches."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The engine on a pretended GPU."""

    pretend: Pretend
    loaded: LoadedDiffusionModel
    reward: RewardModel
    runner: Runner


@contextmanager
def pretended(layers: int | None = None, *, graphs: bool = True, **how: bool) -> Iterator[Setup]:
    """The pair on a GPU that is pretended so (`Pretend`), each with so many layers, or with its own number of them."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(torch.no_grad())
        pretend = stack.enter_context(Pretend(**how))
        texts = Texts.of(Path(folder), DREAM.vocab_size)
        config, shape = DREAM, REWARDS["1.7B"]
        # Its trial run compares values.
        stack.enter_context(patch.object(varlen, "choose", lambda *_: "varlen"))
        loaded = diffusion_model(replace(config, layers=layers or config.layers), texts, DEVICE)
        reward = reward_model(replace(shape, layers=layers or shape.layers), loaded, DEVICE)
        model = loaded.model
        model.model.attention_backend = "varlen"
        pretend.tagged(model, "hidden", "diffusion model")
        pretend.tagged(reward, "read_with_gradient", "reward forward", back="reward backward")
        pretend.tagged(reward, "extend", "reward prefix")
        if graphs:
            model.trunk = GraphedTrunk(model.trunk, pretend.recorder())
            reward.graphed_passes = GraphedPasses(reward, pretend.recorder())
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        footprint = Footprint.of(model, [reward])
        budget, largest = footprint.budgets(MEMORY - 1.3 * weights, 0.8, "cuda", context_length=config.context_length)
        of = model.activation_dtype, model.vocab_size, [reward.table.shape[1]], budget.guided_rows
        kernels = choose_products("auto", model.device, *of)
        runner = Runner(loaded, {"rm": reward}, budget=budget, largest=largest, backend=kernels.backend)
        yield Setup(pretend, loaded, reward, runner)


def jobs(setup: Setup, trajectories: int, **other: Any) -> Iterator[Job]:
    """Requests at the paper's settings (K = 4, M = 3, L = T = 128), of so many trajectories together."""
    for index in range(0, trajectories, 4):
        conversation = (Message("user", f"Tell me about number {index}, in a few short words and a long one."),)
        yield Job(
            id=f"job-{index}",
            prompt_ids=tuple(setup.loaded.tokenizer.render_chat(conversation)),
            sampling=SamplingParams(
                max_tokens=128, best_of=min(4, trajectories - index), seed=index, temperature=0.7, top_p=0.95
            ),
            diffusion=DiffusionParams(steps=128, **other),
            guidance=GuidanceParams("entrgi", (WeightedReward("rm"),), gradient_steps=3),
            conversation=conversation,
        )


def steps_of(setup: Setup, trajectories: int) -> list[Tally]:
    """A tally of each measured step."""
    for job in jobs(setup, trajectories):
        setup.runner.add(job, now=0.0)
    tallies = []
    for _ in range(2 + MEASURED_STEPS):
        setup.pretend.tally = Tally()
        setup.runner.step()
        tallies.append(setup.pretend.tally)
    setup.pretend.tally = Tally()
    return tallies[2:]


def mixed_load(setup: Setup) -> None:
    """Requests of every method, and of what else chooses a kernel or its form, alone and together."""
    from server.methods import METHODS

    given = [
        replace(job, id=f"{method}-{index}", guidance=GuidanceParams(method, job.guidance.reward_models, 1 + index % 3))
        for index, method in enumerate(METHODS)
        for job in jobs(setup, 1 + index % 3)
        if method != "none"
    ]
    for index, settings in enumerate(FORMS):
        for job in jobs(setup, 1 + index % 4, **settings):
            given.append(replace(job, id=f"{index}"))
            given.append(replace(job, id=f"{index}-free", guidance=GuidanceParams()))
    for job in given:
        setup.runner.add(job, now=0.0)
        setup.runner.step()
    for _ in range(MEASURED_STEPS):
        setup.runner.step()


def table(tallies: list[Tally]) -> list[dict[str, Any]]:
    """Kernels by phase, the median and the most of all steps."""
    phases = dict.fromkeys(phase for tally in tallies for phase in tally.kernels)
    rows = [
        {
            "phase": phase,
            "kernels": round(median(tally.kernels[phase] for tally in tallies)),
            "most": max(tally.kernels[phase] for tally in tallies),
        }
        for phase in phases
    ]
    totals = [tally.kernels.total() for tally in tallies]
    return [*rows, {"phase": "all", "kernels": round(median(totals)), "most": max(totals)}]


def count(trajectories: int, *, graphs: bool = True, layers: int | None = None) -> tuple[CaseResult, dict[str, Any]]:
    """The tables, and the counts of the JSON line: medians over steps, and their names with `_most`."""
    with pretended(layers, graphs=graphs) as setup:
        warm_up(setup.runner, setup.loaded, ["rm"])
        warm = set(setup.pretend.variants)
        tallies = steps_of(setup, trajectories)
        mixed_load(setup)
        variants = len(setup.pretend.variants)
        cold = setup.pretend.variants - warm
    of = {
        "kernels_per_step": [tally.kernels.total() for tally in tallies],
        "host_launches_per_step": [tally.launches for tally in tallies],
        "uploads_per_step": [tally.uploads for tally in tallies],
        "waits_per_step": [tally.waits for tally in tallies],
    }
    counts: dict[str, Any] = {name: round(median(values)) for name, values in of.items()}
    counts |= {"triton_variants": variants, "triton_variants_after_warmup": len(cold)}
    figures = [Figure(name, value, at_most=LIMITS.get(name)) for name, value in counts.items()]
    most = {f"{name}_most": max(values) for name, values in of.items()}
    title = f"guided step, {trajectories} trajectories, M = 3, graphs {'on' if graphs else 'off'}"
    operators = sum((tally.operators for tally in tallies), start=type(tallies[0].operators)())
    detail: dict[str, Any] = {"operators": {name: value / len(tallies) for name, value in operators.most_common(25)}}
    detail["cold"] = sorted({variant[0] for variant in cold})
    return CaseResult(title, table(tallies), figures), counts | most | detail


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description="Count what a guided step launches, without a GPU.")
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--layers", type=int, help="of both models; by default their own")
    options = parser.parse_args(arguments)
    result, counts = count(options.trajectories, graphs=not options.no_graphs, layers=options.layers)
    show([result], Console(width=120, highlight=False))
    print(json.dumps(counts))
    return int(any(figure.met is False for figure in result.figures))


if __name__ == "__main__":
    sys.exit(main())
