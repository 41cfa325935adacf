"""The benchmarks' cost model against torch's own formulas for the operations that are really dispatched.

torch counts attention on a CPU only where it is made of matrix products (the `math` backend), as whole rectangles, and
sees nothing of our C++ kernels: where those would run, the reference takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels
from benchmarks.flops import (
    Decoder,
    Flops,
    causal_pairs,
    diffusion_attention,
    recording,
    reward_backward,
    reward_forward,
    vocabulary_product,
)
from benchmarks.workload import Workload, load, run_engine
from kernels.random import row_keys
from server.models.packing import PackedLayout
from server.rewards.reward_model import RewardModel
from tests.support.kernels import choose_kernels
from tests.support.models import FAMILIES, GOLDEN, load_diffusion, load_reward


class Dispatched(TorchDispatchMode):
    """What torch.utils.flop_counter counts, without its module hooks, which do not go with autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    """With attention that torch counts, not ours in C++."""
    return load_reward(dtype=torch.float32, attention="sdpa")


def diffusion(family: str) -> Any:
    model = load_diffusion(family, torch.float32).model
    model.model.attention_backend = "sdpa"
    return model


@pytest.fixture(scope="module")
def dream() -> Any:
    return diffusion("dream")


@pytest.fixture
def counter() -> Iterator[Dispatched]:
    with sdpa_kernel(SDPBackend.MATH):
        yield Dispatched()


def own_rows(reward: RewardModel, prefix: int, lengths: tuple[int, ...]) -> tuple[PackedLayout, torch.Tensor]:
    """Rows of these lengths that continue one prefix, and random embeddings for them."""
    cached = reward.prefill(list(range(1, prefix + 1)))
    embeds = torch.randn(sum(lengths), reward.hidden_size)
    return reward.layout([cached] * len(lengths), lengths), embeds


@pytest.mark.parametrize("family", FAMILIES)
def test_the_diffusion_trunk_is_counted_exactly(family: str, counter: Dispatched) -> None:
    model = diffusion(family)
    lengths = (5, 9, 9, 14)
    with torch.no_grad(), recording(model, None) as recorder, counter:
        hidden = model.hidden(torch.randint(0, 100, (sum(lengths),)), PackedLayout.of(lengths))
        model.head(hidden[:7])
    flops = recorder.count()
    assert flops.total == counter.flops
    assert flops.head == vocabulary_product(7, model.vocab_size, hidden.shape[1])
    assert flops.attention == diffusion_attention(Decoder.of(model.shape), lengths, lengths)


def test_rows_that_are_not_read_cost_less_and_never_more_than_is_done(dream: Any, counter: Dispatched) -> None:
    layout, tokens = PackedLayout.of((8, 12)), torch.randint(0, 100, (20,))
    with torch.no_grad(), recording(dream, None) as recorder, counter:
        dream.masked_logits(tokens, layout, torch.tensor([3, 4, 10, 11, 12, 19]))
    needed, done = recorder.count().total, counter.flops
    with torch.no_grad(), recording(dream, None) as recorder:
        dream.head(dream.hidden(tokens, layout))
    assert needed <= done < recorder.count().total


@pytest.mark.parametrize("lengths", [(1, 1, 1), (7, 7)])
def test_the_reward_forward_does_only_whole_rectangles_on_top(
    dream: Any, reward: RewardModel, counter: Dispatched, lengths: tuple[int, ...]
) -> None:
    rows, embeds = own_rows(reward, 6, lengths)
    with torch.no_grad(), recording(dream, reward) as recorder, counter:
        reward.read(rows, embeds)
    decoder = Decoder.of(reward.shape)
    needed = reward_forward(decoder, (6,) * len(lengths), lengths)
    hidden = sum(length * (length - 1) // 2 for length in lengths)  # the triangles that causality hides
    assert recorder.count() == Flops(reward_forward=needed)
    assert counter.flops == needed + decoder.attention((decoder.layers - 1) * hidden)


def test_the_reward_backward_wastes_only_hidden_triangles_and_cached_keys(reward: RewardModel) -> None:
    prefixes, lengths = (6, 6), (7, 7)
    rows, embeds = own_rows(reward, 6, lengths)
    embeds.requires_grad_(True)
    backward = Dispatched()
    with sdpa_kernel(SDPBackend.MATH):
        total = reward.read(rows, embeds).sum()
        with backward:
            torch.autograd.grad(total, [embeds])
    decoder = Decoder.of(reward.shape)
    cached, own = causal_pairs(prefixes, lengths)
    rectangle = sum(length * length for length in lengths)
    wasted = (decoder.layers - 1) * (2 * (rectangle - own) + cached) + sum(prefixes)
    assert backward.flops == reward_backward(decoder, prefixes, lengths) + decoder.attention(wasted)


def test_the_products_over_the_vocabulary_are_counted_exactly(dream: Any, counter: Dispatched) -> None:
    rows, vocab_size, width = 6, 50, 8
    table = torch.randn(vocab_size, width)
    whole, greedy = torch.full((rows,), vocab_size), torch.zeros(rows, dtype=torch.bool)
    params = kernels.RowParams(*(torch.full((rows,), value) for value in (0.7, 0.9)), whole, greedy, torch.ones(rows))
    with recording(dream, None) as recorder, counter:
        state = kernels.begin(torch.randn(rows, vocab_size), params, backend="reference")
        tokens = kernels.draw(state, row_keys(*(torch.arange(rows) for _ in range(6))))
        mixed = kernels.mix(state, table, tokens, torch.rand(rows))
        kernels.update(state, [kernels.Term(torch.randn(rows, width), table, mixed.soft)])
    assert recorder.count() == Flops(mix=2 * rows * vocab_size * width, update=2 * rows * vocab_size * width)
    assert recorder.count().total == counter.flops


def test_a_whole_guided_run_needs_no_more_than_it_does(counter: Dispatched, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and most of what it does: what is beyond is the waste that the tests above name."""
    choose_kernels(monkeypatch, BACKEND="reference")
    pair = load(GOLDEN / "dream-tiny/dlm", GOLDEN / "dream-tiny/rm", torch.float32, torch.device("cpu"))
    pair.loaded.model.model.attention_backend = "sdpa"
    assert pair.reward is not None
    pair.reward.attention_backend = "sdpa"
    jobs = Workload(prompts=2, best_of=2, max_tokens=12, steps=6).jobs(pair)
    with counter:
        run = run_engine(pair, jobs)
    assert run.flops is not None
    assert 0.6 * counter.flops < run.flops.total <= counter.flops
    assert all(value > 0 for value in run.flops.by_phase().values())


def test_watching_leaves_no_trace(dream: Any, reward: RewardModel) -> None:
    before = (kernels.mix, kernels.update, set(vars(reward)), set(vars(dream)))
    with recording(dream, reward), pytest.raises(ValueError, match="no trace"):
        raise ValueError("no trace")
    assert before == (kernels.mix, kernels.update, set(vars(reward)), set(vars(dream)))
