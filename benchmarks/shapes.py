"""The matrix-product rate at the shapes that a workload really has.

A large square product shows the machine's best rate. A network of width 256 has none of those: its products are thin,
and the same library runs them slower. Both are measured, so that a report tells what the engine loses and what the
shapes do.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.flops import Decoder, Flops
from benchmarks.machine import Product, Rate, product_rate
from benchmarks.workload import Pair, Workload
from server.text.template import split_at_response


def own_shapes(pair: Pair, workload: Workload) -> dict[str, Product]:
    """Kind of operation, as in `Flops` -> a typical product of it, in the middle of the run of all jobs at once."""
    job = workload.jobs(pair)[0]
    trajectories = workload.prompts * workload.best_of
    rows = trajectories * (workload.max_tokens + 1) // 2
    tokens = trajectories * (len(job.prompt_ids) + workload.max_tokens)
    decoder, vocab_size = Decoder.of(pair.loaded.model.shape), pair.loaded.model.vocab_size
    shapes = {
        "trunk": (tokens, decoder.hidden, decoder.intermediate),
        "head": (rows, decoder.hidden, vocab_size),
    }
    if pair.reward is not None:
        reward = Decoder.of(pair.reward.shape)
        _, suffix = split_at_response(pair.reward.tokenizer, job.conversation, job.response_suffix)
        own = trajectories * (workload.max_tokens + len(suffix))
        shapes |= {
            "mix": (rows, vocab_size, reward.hidden),
            "update": (rows, reward.hidden, vocab_size),
            "reward": (own, reward.hidden, reward.intermediate),
        }
    return shapes


def rates(pair: Pair, shapes: Mapping[str, Product]) -> dict[str, Rate]:
    """The rate of every shape at this moment."""
    return {kind: product_rate(shape, pair.dtype, pair.device) for kind, shape in shapes.items()}


def best(before: Mapping[str, Rate], after: Mapping[str, Rate]) -> dict[str, Rate]:
    """The better of two measurements, kind by kind."""
    return {kind: rate.max(after[kind]) for kind, rate in before.items()}


def ideal_seconds(flops: Flops, own: Mapping[str, Rate]) -> float:
    """What the operations would take, each at the rate of its own shape; attention at that of its network."""
    reward = flops.reward_forward + flops.reward_backward + flops.reward_prefix
    parts = {
        "trunk": flops.trunk + flops.attention,
        "head": flops.head,
        "mix": flops.mix,
        "update": flops.update,
        "reward": reward,
    }
    return sum(operations / own[kind].wall for kind, operations in parts.items() if operations)
