"""Packed sequences: the layout's numbers, and attention against a softmax written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.packing import PackedLayout, Run, attend


def plain_attention(q, k, v, lengths):
    """Softmax attention of each sequence by itself, key heads repeated, nothing fused. float64."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[here, head] @ k[here, head // groups].T / math.sqrt(q.shape[-1])
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            outputs.append((here, head, weights @ v[here, head // groups]))
        start += length
    mixed = torch.empty_like(q)
    for here, head, value in outputs:
        mixed[here, head] = value
    return mixed


def random_qkv(tokens, heads, key_heads, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, count, channels, dtype=torch.float64, generator=generator)
        for count in (heads, key_heads, key_heads)
    )


def test_layout_numbers():
    layout = PackedLayout.of([3, 2, 2, 1])
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    assert layout.starts.tolist() == [0, 3, 5, 7]
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 7, 8]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.positions.dtype == layout.starts.dtype == torch.int64
    assert layout.runs == (Run(0, 1, 3), Run(3, 2, 2), Run(7, 1, 1))
    assert (layout.tokens, layout.max_length) == (8, 3)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0], [-1]])
def test_empty_sequences_are_refused(lengths):
    with pytest.raises(ValueError, match="positive"):
        PackedLayout.of(lengths)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    seed=st.integers(0, 1000),
)
def test_attention_equals_the_written_out_softmax(lengths, heads, seed):
    q, k, v = random_qkv(sum(lengths), *heads, 8, seed)
    mixed = attend(q, k, v, PackedLayout.of(lengths))
    torch.testing.assert_close(mixed, plain_attention(q, k, v, lengths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (4, 7, 4), (1, 12)])
def test_attention_in_float32_is_close(lengths):
    q, k, v = random_qkv(sum(lengths), 4, 2, 16)
    mixed = attend(q.float(), k.float(), v.float(), PackedLayout.of(lengths))
    torch.testing.assert_close(mixed.double(), plain_attention(q, k, v, lengths), rtol=0, atol=5e-6)


def test_attention_gradients():
    q, k, v = (x.requires_grad_() for x in random_qkv(7, 4, 2, 3))
    layout = PackedLayout.of([3, 2, 2])
    assert torch.autograd.gradcheck(lambda *args: attend(*args, layout), (q, k, v))


def test_sequences_do_not_see_each_other():
    q, k, v = random_qkv(9, 4, 2, 8)
    layout = PackedLayout.of([4, 5])
    before = attend(q, k, v, layout)
    for x in (q, k, v):
        x[4:] += 1.0
    after = attend(q, k, v, layout)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])


def test_projections_of_a_wider_tensor_are_not_disturbed():
    """q, k and v may be views with any stride, as after a fused projection."""
    q, k, v = random_qkv(10, 4, 2, 8)
    fused = torch.cat((q, k, v), dim=1)
    layout = PackedLayout.of([5, 5])
    views = attend(fused[:, :4], fused[:, 4:6], fused[:, 6:], layout)
    torch.testing.assert_close(views, attend(q, k, v, layout), rtol=0, atol=1e-15)
