"""Which kernels a server takes: decided from what is known when it loads."""

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import choose_products
from kernels.roofline import DEVICES, MARGIN, estimate

H100 = (9, 0)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_estimate_follows_from_its_arithmetic():
    """Many rows on an H100: two products at 790 TFLOP/s, or at three quarters of it, and 22 or 13 bytes an element."""
    n, v, d = 8192, 151_936, 2048
    product, element = 2.0 * n * v * d / 790e12, n * v / 3e12
    seconds = estimate(H100, v, [d], n)
    assert seconds.library == pytest.approx(2 * product + 22 * element, rel=0.01)
    assert seconds.fused == pytest.approx(2 * product / 0.75 + (40 / 3) * element + 8 * 16_384 * n / 3e12, rel=0.01)
    twice = estimate(H100, v, [d, d], n)
    assert twice.library == pytest.approx(2 * seconds.library)


def test_few_rows_are_bound_by_the_table_and_by_launches():
    for capability in DEVICES:
        few = estimate(capability, 151_936, [1024], 16)
        assert few.fused < few.library
        assert few.fused >= 2 * 2 * 151_936 * 1024 / DEVICES[capability].bytes


def test_a_device_counts_as_the_newest_known_one_that_is_not_newer():
    for capability, known in (((7, 5), (8, 0)), ((8, 7), (8, 6)), ((9, 9), (9, 0)), ((12, 0), (10, 0))):
        assert estimate(capability, 1000, [64], 128) == estimate(known, 1000, [64], 128)


def test_an_h100_takes_the_fused_kernels_for_the_usual_reward_models(monkeypatch):
    """As far as that can be said of a machine without one: triton and the device's class are pretended."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: H100)
    for hidden, expected in ((1024, "fused"), (2048, "fused"), (2560, "fused"), (4096, "triton")):
        found = choose_products("auto", CUDA, torch.bfloat16, 152_064, [hidden], 8192)
        assert found.backend == expected
        assert "8192 rows: fused" in found.why
        seconds = estimate(H100, 152_064, [hidden], 8192)
        assert (seconds.fused <= (1 + MARGIN) * seconds.library) == (expected == "fused")
    for wish, expected in (("fused", "fused"), ("library", "triton")):
        assert choose_products(wish, CUDA, torch.bfloat16, 152_064, [4096], 8192).backend == expected
    assert choose_products("auto", CUDA, torch.float32, 152_064, [2048], 8192).backend == "triton"
    assert choose_products("auto", CUDA, torch.bfloat16, 152_064, [], 16).backend == "triton"


def test_without_a_gpu_there_is_nothing_to_choose():
    for wish in ("auto", "library"):
        found = choose_products(wish, CPU, torch.float32, 1000, [64], 128)
        assert found.backend == dispatch.choose(CPU, torch.float32)
    with pytest.raises(ValueError, match="'fused' cannot run here: it needs a CUDA device, triton and 16-bit weights"):
        choose_products("fused", CPU, torch.bfloat16, 1000, [64], 128)
    assert dispatch.try_triton(CPU) == ""
