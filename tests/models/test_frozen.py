"""A frozen decoder's straight lines against its modules in float64: states, keys and values, and gradients."""

import copy

import pytest
import torch

from kernels.cpp.build import library
from server.models.layers import Decoder, DecoderConfig, Variant
from server.models.lora import Adapter
from server.models.packing import EMPTY_PREFIX, PackedLayout, attend, grown

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

SIZES = DecoderConfig(hidden=24, intermediate=40, heads=4, key_heads=2, head_size=8, layers=3, vocab_size=11)
LENGTHS = (5, 1, 9)
VARIANTS = {
    "Llama": Variant(),
    "Qwen2": Variant(qkv_bias=True),
    "Qwen3": Variant(head_norms=True),
    "out bias": Variant(qkv_bias=True, out_bias=True, head_norms=True),
}


def decoders(variant, stack):
    """One as its modules are, in float64, and one frozen, in float32, with the same random weights."""
    torch.manual_seed(0)
    exact = Decoder(SIZES, variant)
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    frozen = copy.deepcopy(exact)
    frozen.freeze(stack=stack)
    return exact.double().requires_grad_(False), frozen


def inputs(decoder, causal, dtype, prefix=True):
    """Embeddings, rotations and layout: rows of which one continues a cached prefix."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), SIZES.hidden, generator=generator, dtype=torch.float64).to(dtype)
    shape = (2, SIZES.layers, 7, SIZES.key_heads, SIZES.head_size)
    keys, values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    (cached,) = grown((EMPTY_PREFIX,), (7,), list(zip(keys, values, strict=True)))
    prefixes = (EMPTY_PREFIX, cached, cached) if prefix else ()
    layout = PackedLayout.of(LENGTHS, prefixes=prefixes, causal=causal)
    return x, *decoder.rotary.rows(layout.positions, 32, dtype), layout


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stack", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_states_and_prefixes_are_those_of_the_modules(variant, stack):
    """With and without chosen rows, with and without an adapter."""
    found = []
    ways = (torch.float64, "sdpa"), (torch.float32, "cpp")
    for decoder, (dtype, backend) in zip(decoders(variant, stack), ways, strict=True):
        x, cos, sin, layout = inputs(decoder, False, dtype)
        assert (decoder.frozen is not None and decoder.frozen.takes(x)) == (dtype == torch.float32)

        def attention(layer, q, k, v, layout=layout, backend=backend):
            return attend(layout, layer, q, k, v, backend)

        torch.manual_seed(2)
        adapted = {
            projection: (
                torch.randn(2, projection.in_features).to(dtype),
                torch.randn(projection.out_features, 2).to(dtype),
            )
            for block in decoder.blocks
            for projection in (block.self_attn.k_proj, block.self_attn.o_proj, block.mlp.up_proj)
        }
        rows = torch.tensor([0, 5, 14, 13])
        runs = ((Adapter(adapted), slice(1, 6)),)
        found.append([
            decoder.states(x, cos, sin, attention, None),
            decoder.states(x, cos, sin, attention, rows),
            decoder.states(x, cos, sin, attention, rows, runs),
            *(each for pair in decoder.keys_and_values(x, cos, sin, attention, runs) for each in pair),
        ])  # fmt: skip
    for exact, got in zip(*found, strict=True):
        close(got, exact)
    assert not torch.allclose(found[0][1], found[0][2])  # the adapter did something


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_inputs_are_autograd_s(variant):
    exact, frozen = decoders(variant, True)
    x, cos, sin, layout = inputs(exact, True, torch.float64)
    x.requires_grad_()
    expected = exact.last_states(x, cos, sin, layout, "sdpa")
    along = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (slope,) = torch.autograd.grad(expected, [x], along)
    x, cos, sin, layout = inputs(frozen, True, torch.float32)
    for backend in ("cpp", "sdpa"):
        states, gradient = frozen.frozen.last_states_and_gradient(x, cos, sin, layout, backend)
        close(states, expected)
        close(gradient(along.float()), slope)
    close(frozen.last_states(x, cos, sin, layout, "cpp"), expected)


def test_one_that_asks_for_autograd_gets_the_modules():
    _, frozen = decoders(VARIANTS["Qwen3"], True)
    x, cos, sin, layout = inputs(frozen, True, torch.float32)
    straight, x = frozen.last_states(x, cos, sin, layout, "cpp"), x.requires_grad_()
    states = frozen.last_states(x, cos, sin, layout, "cpp")
    torch.testing.assert_close(states, straight)
    assert torch.autograd.grad(states.sum(), [x])[0].abs().sum() > 0
    assert all(not parameter.requires_grad for parameter in frozen.parameters())
