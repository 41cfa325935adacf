"""All families against logits recorded from the published research code, and packed against one at a time."""

import json

import pytest
import torch

from demo.train_dlm import initialise
from server.models.packing import PackedLayout
from server.models.registry import family_of
from tests.support.golden import recorded_logits
from tests.support.kernels import choose_kernels
from tests.support.models import FAMILIES, GOLDEN, diffusion, load_diffusion

TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def cases(family):
    return recorded_logits(family)


def masked_rows(model, canvas):
    return (canvas == model.mask_token_id).nonzero().squeeze(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_recorded_logits(family, cases, dtype):
    model = diffusion(family, dtype).model
    for canvas, recorded, size in cases:
        logits = model.masked_logits(canvas, PackedLayout.of([len(canvas)]), masked_rows(model, canvas))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.double(), recorded, rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_ragged_batch_equals_one_at_a_time(family, dtype, atol):
    model = diffusion(family, dtype).model
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 31, 5, 5, 1, 18, 64)
    sequences = [torch.randint(0, model.vocab_size, (length,), generator=generator) for length in lengths]
    packed = model.head(model.hidden(torch.cat(sequences), PackedLayout.of(lengths)))
    alone = [model.head(model.hidden(tokens, PackedLayout.of([len(tokens)]))) for tokens in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=atol)


def test_masked_logits_are_the_full_logits_at_their_rows(family, cases):
    """Row r of Dream is output r - 1, but a sequence's first row is its own, also in the middle of a batch."""
    model = diffusion(family).model
    lengths = [len(canvas) for canvas, *_ in cases]
    tokens, layout = torch.cat([canvas for canvas, *_ in cases]), PackedLayout.of(lengths)
    full = model.head(model.hidden(tokens, layout))
    if model.shifts:
        expected = torch.cat([torch.cat((sequence[:1], sequence[:-1])) for sequence in full.split(lengths)])
    else:
        expected = full
    starts = layout.cu_q.tolist()
    for rows in (torch.arange(len(tokens)), torch.tensor([starts[2], 3, starts[1], starts[1] - 1, starts[1] + 1, 0])):
        torch.testing.assert_close(model.masked_logits(tokens, layout, rows), expected[rows], rtol=0, atol=1e-12)
    assert model.masked_logits(tokens, layout, torch.empty(0, dtype=torch.int64)).shape == (0, model.vocab_size)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_stays_near(family, cases, native, monkeypatch):
    """Half precision computes norms and rotations in float32: rounding errors stay at the size of bfloat16's own.
    So do they where activations are in float32, for want of instructions for bfloat16."""
    choose_kernels(monkeypatch, BFLOAT16="1" if native else "0")
    model = load_diffusion(family, torch.bfloat16).model
    canvas, recorded, _ = cases[1]
    logits = model.masked_logits(canvas, PackedLayout.of([len(canvas)]), masked_rows(model, canvas))
    assert logits.dtype == model.activation_dtype == (torch.bfloat16 if native else torch.float32)
    assert (logits.double() - recorded).norm() < 0.03 * recorded.norm()


def test_training_gradients_agree_with_finite_differences(family):
    """A model built from a config is trainable: the loss's directional derivative matches a central difference."""
    raw = {"mask_token_id": 3} | json.loads((GOLDEN / f"{family}-tiny" / "dlm" / "config.json").read_text())
    build = family_of(raw)
    model = build(build.read_config(raw)).double()
    initialise(model, seed=4)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, model.vocab_size, (14,), generator=generator)
    layout, rows, targets = PackedLayout.of([6, 8]), torch.tensor([0, 4, 6, 13]), torch.tensor([7, 8, 9, 10])

    def loss():
        return torch.nn.functional.cross_entropy(model.masked_logits(tokens, layout, rows), targets)

    loss().backward()
    parameters = list(model.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            values.append(loss())
    difference = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(difference, slope, rtol=1e-6, atol=0)
