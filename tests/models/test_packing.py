"""Packed rows: the layout's numbers, and every way to compute their attention against a softmax written out in
float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.models.packing import EMPTY_PREFIX, PackedLayout, Prefix, attend, grown, places
from tests.support.kernels import choose_kernels
from tests.support.models import whole

Heads = tuple[int, int]


def written_out(layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, *, last: bool = False) -> Tensor:
    """Softmax attention of each query by itself, over its row's prefix, the tokens before it that it sees and its own.
    float64."""
    outputs, first = [], 0
    groups = q.shape[1] // k.shape[1]
    for row, (prefix, length, more) in enumerate(zip(layout.prefixes, layout.lengths, layout.before, strict=True)):
        before = [x.transpose(0, 1) for x in whole(prefix, 0)] if prefix.length else [k[:0], v[:0]]
        own = slice(first - more, first + length)
        keys, values = torch.cat([before[0], k[own]]), torch.cat([before[1], v[own]])
        for place in [length - 1] if last else range(length):
            seen = prefix.length + more + (place + 1 if layout.causal else length)
            query = q[row if last else first + place]
            for head in range(q.shape[1]):
                scores = keys[:seen, head // groups] @ query[head] / math.sqrt(q.shape[-1])
                outputs.append(torch.softmax(scores, 0) @ values[:seen, head // groups])
        first += length
    return torch.stack(outputs).view(-1, q.shape[1], q.shape[2])


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def chain(seed: int, key_heads: int, size: int, dtype: torch.dtype = torch.float64) -> list[Prefix]:
    """No prefix, one, and a longer one that continues it."""
    both, more = (x.to(dtype) for x in random(seed, *((1, 2, key_heads, length, size) for length in (5, 3))))
    parent = Prefix(5, both)
    return [EMPTY_PREFIX, parent, Prefix(8, more, parent)]


def test_numbers_of_rows_that_continue_prefixes() -> None:
    none, parent, child = chain(0, 1, 2)
    layout = PackedLayout.of([2, 3, 1, 2], prefixes=[child, none, parent, child], causal=True)
    assert layout.positions.tolist() == [8, 9, 0, 1, 2, 5, 8, 9]
    assert (layout.cu_q.tolist(), layout.cu_k.tolist()) == ([0, 2, 5, 6, 8], [0, 10, 13, 19, 29])
    assert layout.cu_q.dtype == layout.cu_k.dtype == torch.int32
    assert layout.positions.dtype == layout.lasts.dtype == torch.int64
    assert (layout.tokens, layout.lasts.tolist()) == (8, [1, 4, 5, 7])
    assert layout.links == (parent, child)
    first, second = [0, 1, 2, 3, 4], [5, 6, 7]
    assert layout.gather is not None
    assert layout.gather.tolist() == [
        *first, *second, 8, 9, 10, 11, 12, *first, 13, *first, *second, 14, 15,
    ]  # fmt: skip
    assert (layout.longest, layout.longest_keys) == (3, 10)
    hiding = layout.hiding(torch.tensor([1, 3, 1, 2]), layout.positions)
    assert hiding.lasts.tolist() == [0, 4, 5, 7]
    assert hiding.hidden is not None
    assert hiding.hidden.tolist() == [False, True, *[False] * 6]
    assert layout.hidden is PackedLayout.of([3, 2]).gather is None


@pytest.mark.parametrize("lengths", [[], [0], [3, 0], [-1]])
def test_empty_rows_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        PackedLayout.of(lengths)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 prefixes"):
        PackedLayout.of([1, 2], prefixes=[EMPTY_PREFIX])
    with pytest.raises(ValueError, match="2 positions"):
        PackedLayout.of([1, 2], positions=torch.arange(2))
    with pytest.raises(ValueError, match="before them"):
        PackedLayout.of([1, 2], before=[0, 2])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    causal=st.booleans(),
    last=st.booleans(),
    backend=st.sampled_from(["sdpa", "reference", "cpp"]),
    seed=st.integers(0, 1000),
)
def test_attention_is_the_written_out_softmax(
    rows: list[tuple[int, int, int]], heads: Heads, causal: bool, last: bool, backend: str, seed: int
) -> None:
    """The C++ pass takes float32, or leaves the work to the plain way where there is no compiler."""
    last = last and causal
    lengths, prefixes = [length for length, *_ in rows], chain(seed, heads[1], 8)
    before = [0 if causal else min(more, start) for start, (*_, more) in zip(places(lengths), rows, strict=True)]
    count = len(rows) if last else sum(lengths)
    q, k, v = random(seed, (count, heads[0], 8), *[(sum(lengths), heads[1], 8)] * 2)
    layout = PackedLayout.of(lengths, prefixes=[prefixes[which] for _, which, _ in rows], before=before, causal=causal)
    assert layout.longest_keys == int(layout.cu_k.diff().max())
    expected = written_out(layout, q, k, v, last=last)
    if backend != "cpp":
        torch.testing.assert_close(attend(layout, 0, q, k, v, backend, last=last), expected, rtol=0, atol=1e-12)
        return
    prefixes = chain(seed, heads[1], 8, torch.float32)
    layout = PackedLayout.of(lengths, prefixes=[prefixes[which] for _, which, _ in rows], before=before, causal=causal)
    got = attend(layout, 0, q.float(), k.float(), v.float(), backend, last=last)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


def test_without_a_compiler_the_plain_way_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels(monkeypatch, CPP="off")
    q, k, v = random(0, (5, 2, 4), (5, 1, 4), (5, 1, 4))  # float64, which the C++ pass would refuse
    layout = PackedLayout.of([2, 3])
    torch.testing.assert_close(attend(layout, 0, q, k, v, "cpp"), written_out(layout, q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_gradients(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in random(1, (7, 4, 3), (7, 2, 3), (7, 2, 3)))
    prefixes = chain(2, 2, 3)
    layout = PackedLayout.of([3, 2, 2], prefixes=prefixes, causal=causal)
    assert torch.autograd.gradcheck(lambda *x: attend(layout, 0, *x), (q, k, v))


def test_rows_that_grow_share_the_first_prefix_and_hold_what_they_added() -> None:
    none, parent, child = chain(5, 2, 4)
    layout = PackedLayout.of([2, 1, 3], prefixes=[none, parent, child])
    k, v = random(6, (6, 2, 4), (6, 2, 4))
    first, second, third = grown(layout.prefixes, layout.lengths, [(k, v)])
    assert [(each.length, each.own, each.parent) for each in (first, second, third)] == [
        (2, 2, None), (6, 1, parent), (11, 6, parent),
    ]  # fmt: skip
    for longer, prefix, start, length in ((first, none, 0, 2), (second, parent, 2, 1), (third, child, 3, 3)):
        for index, own in ((0, k), (1, v)):
            before = whole(prefix, 0)[index] if prefix.length else own[:0].transpose(0, 1)
            expected = torch.cat([before, own[start:][:length].transpose(0, 1)], dim=1)
            assert torch.equal(whole(longer, 0)[index], expected)
            assert torch.equal(longer.joined().keys[0] if index == 0 else longer.joined().values[0], expected)
            assert longer.keys[0].is_contiguous()
