"""Variable-length attention: its metadata, what is chosen, and every kernel that this machine has against the
specification, which tests/models/test_packing.py holds to a softmax written out in float64."""

import pytest
import torch

from kernels import attention, varlen
from kernels.varlen import Spans, choose, unavailable

CASES = (
    ([3], [3]),
    ([3, 2, 2, 1], [3, 2, 2, 1]),  # whole sequences
    ([1, 4, 2], [6, 4, 9]),  # rows behind prefixes
    ([1, 1, 1], [5, 1, 130]),  # one query a row
    ([1, 0, 1, 0, 1, 0], [5, 2, 1, 40, 130, 7]),  # and keys that no query asks
    ([70, 129, 33], [200, 129, 97]),
)
NEEDS_GPU = "a variable-length attention kernel needs a CUDA device"


def _tensors(case, channels, seed=0):
    queries, keys = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2), (sum(queries), 4))
    *inputs, g = (torch.randn(*shape, channels, dtype=torch.float64, generator=generator) for shape in shapes)
    return inputs, g


def test_the_metadata():
    spans = Spans.of([1, 4, 2], [6, 4, 9])
    assert spans.cu_q.tolist() == [0, 1, 5, 7]
    assert spans.cu_k.tolist() == [0, 6, 10, 19]
    assert spans.cu_q.dtype == spans.cu_k.dtype == torch.int32
    assert (spans.max_q, spans.max_k) == (4, 9)
    for queries, keys in (([], []), ([2], [1]), ([0], [0]), ([1], [1, 1])):
        with pytest.raises(ValueError, match="queries"):
            Spans.of(queries, keys)


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "needs a CUDA device"),
        ("cuda", torch.float32, 64, "needs float16 or bfloat16, not float32"),
        ("cuda", torch.bfloat16, 20, "multiple of 8 channels"),
        ("cuda", torch.bfloat16, 264, "at most 256"),
    ],
)
def test_what_cannot_run_says_why(device, dtype, channels, reason):
    assert reason in str(unavailable("varlen", torch.device(device), dtype, channels))
    with pytest.raises(ValueError, match=f"varlen cannot run here: .*{reason}"):
        choose("varlen", torch.device(device), dtype, channels)
    assert choose("auto", torch.device(device), dtype, channels) == (
        "cpp" if device == "cpu" and attention.runs() else "sdpa"
    )


def test_sdpa_always_runs_and_unknown_names_are_refused():
    assert choose("sdpa", torch.device("cpu"), torch.float64, 7) == "sdpa"
    with pytest.raises(ValueError, match="auto, varlen, cpp, sdpa"):
        choose("xformers", torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ValueError, match="no variable-length attention"):
        varlen.attend("sdpa", *_tensors(0, 8)[0], Spans.of(*CASES[0]))


def test_a_kernel_that_gives_wrong_numbers_is_not_believed(monkeypatch):
    """Causality aligned at the top left, as other attention kernels have it, is noticed by the trial run."""

    def top_left(q, k, v, spans, causal, scale):  # type: ignore[no-untyped-def]
        lengths = spans.cu_q.diff().tolist()
        keys = torch.cat([start + torch.arange(n) for start, n in zip(spans.cu_k.tolist(), lengths, strict=False)])
        if not causal:
            return varlen.reference(q, k, v, spans, causal, scale)
        first = Spans(spans.cu_q, spans.cu_q, spans.max_q, spans.max_q)
        return varlen.reference(q, k[keys], v[keys], first, causal, scale)

    varlen._probe.cache_clear()
    monkeypatch.setitem(varlen._IMPLEMENTATIONS, "varlen", top_left)
    assert "off by" in str(varlen._probe("varlen", torch.device("cpu"), torch.bfloat16, 16))
    varlen._probe.cache_clear()
    monkeypatch.setitem(varlen._IMPLEMENTATIONS, "varlen", varlen.reference)
    assert varlen._probe("varlen", torch.device("cpu"), torch.bfloat16, 16) is None
    varlen._probe.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_GPU)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("channels", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_agrees_with_the_specification(dtype, channels, case, causal):
    device = torch.device("cuda")
    reason = unavailable("varlen", device, dtype, channels)
    if reason is not None:
        pytest.skip(reason)
    inputs, g = _tensors(case, channels)
    results = []
    for each, kind, where in (("varlen", dtype, device), ("reference", torch.float64, torch.device("cpu"))):
        leaves = [x.to(dtype).to(where, kind).requires_grad_() for x in inputs]
        out = varlen.attend(each, *leaves, Spans.of(*CASES[case], where), causal=causal)
        results.append([out, *torch.autograd.grad(out, leaves, g.to(dtype).to(where, kind))])
    for got, exact in zip(*results, strict=True):
        assert (got.double().cpu() - exact).norm() <= 0.01 * exact.norm()
