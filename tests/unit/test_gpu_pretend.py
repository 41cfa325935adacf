"""The pretended GPU counts what a GPU would be told to do, and stops what would wait for one unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu.pretend import DEVICE, Pretend
from kernels.transfer import download, upload

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build has no fake GPU")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_cuda_build)], ids=["meta", "fake"])
def pretend(request: pytest.FixtureRequest) -> Iterator[Pretend]:
    with torch.no_grad(), Pretend(fake=request.param) as made:
        yield made


def test_kernels_copies_and_waits_are_counted(pretend: Pretend) -> None:
    x = upload(torch.ones(3, 4), DEVICE)
    assert (x.is_cuda, x.device, torch.ones(1).is_cuda) == (True, DEVICE, False)
    with pretend.during("products"):
        y = (x @ x.T).relu().view(9)
    y[:2] += 1
    (back, nothing) = download([y, None])
    tally = pretend.tally
    assert (back.shape, nothing) == ((9,), None)
    assert (tally.uploads, tally.waits) == (1, 1)
    assert tally.kernels["products"] == 2
    assert tally.launches == tally.kernels.total() + tally.uploads + tally.waits


def test_a_graph_is_one_launch_of_the_host(pretend: Pretend) -> None:
    x = torch.ones(4, device=DEVICE)
    replay = pretend.recorder()(lambda: (x.exp().add(1).log(),))
    before = pretend.tally.launches
    replay()
    (out,) = replay()
    assert out.shape == (4,)
    assert (pretend.tally.graphs, pretend.tally.launches - before) == (2, 2)
    assert pretend.tally.operators["exp"] == 2


HIDDEN_WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x: torch.nonzero(x),
    "cpu": lambda x: x.cpu().numpy(),
}


@pytest.mark.parametrize("wait", HIDDEN_WAITS)
def test_what_would_wait_unseen_cannot_go_on(wait: str) -> None:
    with Pretend(), pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        HIDDEN_WAITS[wait](torch.ones(3, device=DEVICE))


def test_a_gradient_runs_backwards(pretend: Pretend) -> None:
    if pretend.fake:
        pytest.skip("autograd asks for the device itself")
    with torch.enable_grad():
        x = torch.ones(3, 4, device=DEVICE, requires_grad=True)
        total = (x @ x.detach().T).sum()
        pretend.tally.kernels.clear()
        (g,) = torch.autograd.grad(total, [x])
    assert g.shape == x.shape
    assert pretend.tally.operators["mm"] == 2


@needs_cuda_build
def test_fake_tensors_of_two_devices_do_not_mix() -> None:
    with Pretend(fake=True), torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


def test_variants_are_what_triton_tells_apart(pretend: Pretend) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, count, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(x + tl.arange(0, BLOCK), count + rows)

    def launched(*calls: tuple[object, ...]) -> int:
        pretend.variants.clear()
        for x, count, rows, block in calls:
            kernel[(1,)](x, count, rows, BLOCK=block, num_warps=4)
        return len(pretend.variants)

    x = torch.ones(64, device=DEVICE)
    assert launched((x, 16, 3, 8), (x, 32, 5, 8), (x[16:], 48, 7, 8)) == 1
    assert launched((x, 16, 3, 8), (x, 17, 3, 8), (x, 1, 3, 8), (x, 16, 3, 16), (x[1:], 16, 3, 8)) == 5
    assert launched((x, 16, 3, 8), (x.half(), 16, 3, 8), (x, 2**40, 3, 8)) == 3
