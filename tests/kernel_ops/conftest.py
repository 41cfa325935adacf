"""Implementations under test, random cases, and the yardstick: float64 truth, relative to plain torch's own error.

The same tests run for every implementation: plain torch and C++ on the CPU, both torch and Triton on a GPU where
there is one (marked `gpu`), and Triton in its interpreter when TRITON_INTERPRET=1 is set before Python starts, which
test_triton_interpreter.py does in a process of its own.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kernels
from kernels.random import row_keys
from tests.support.kernels import choose_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SHAPES = [(5, 37, 3), (3, 1, 2), (4, 2, 5), (7, 1024, 8), (6, 1025, 9), (9, 3001, 17), (130, 517, 33)]  # N, V, D
SMALL_SHAPES = [(3, 37, 3), (2, 1031, 17)]


@dataclass(frozen=True)
class Implementation:
    backend: str
    device: str
    target: str = "native"  # of C++

    @property
    def interpreted(self) -> bool:
        return self.on_triton and self.device == "cpu"

    @property
    def on_triton(self) -> bool:
        return self.backend in ("triton", "fused")

    @property
    def dtypes(self) -> list[torch.dtype]:
        exact = [torch.float64] if self.backend == "torch" else []
        # The interpreter is slow, and float16 differs from float32 in nothing but its loads.
        half = [] if self.backend == "cpp" or self.interpreted else [torch.float16]
        return [*exact, torch.float32, torch.bfloat16, *half]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return SMALL_SHAPES if self.interpreted else SHAPES


def _implementations() -> list[object]:
    if INTERPRETED:
        return [pytest.param(Implementation(name, "cpu"), id=f"{name}-interpreter") for name in ("triton", "fused")]
    found = [pytest.param(Implementation("torch", "cpu"), id="torch-cpu")]
    if "cpp" in kernels.available_backends():
        found.append(pytest.param(Implementation("cpp", "cpu"), id="cpp-cpu"))
        found.append(pytest.param(Implementation("cpp", "cpu", "baseline"), id="cpp-baseline"))
    if torch.cuda.is_available():
        found += [
            pytest.param(Implementation(backend, "cuda"), id=f"{backend}-cuda", marks=pytest.mark.gpu)
            for backend in ("torch", "triton", "fused")
        ]
    return found


@pytest.fixture(params=_implementations())
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    choose_kernels(monkeypatch, CPP=request.param.target)
    return request.param


class Case:
    """Random logits, parameters, table and reward gradients, all from one seed."""

    def __init__(self, n: int, v: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.n, self.v, self.d, self.dtype, self.device = n, v, d, dtype, device
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = g
        self.logits = self.normal(n, v, dtype=dtype) * 3
        greedy = torch.rand(n, generator=g) < 0.15
        some = torch.rand(n, generator=g) < 0.5
        tau = torch.rand(n, generator=g) * 1.2 + 0.2
        self.params = kernels.RowParams(
            tau=torch.where(greedy, 1.0, tau).to(device, self.compute),
            top_p=(torch.rand(n, generator=g) * 0.7 + 0.3).to(device, self.compute),
            top_k=torch.where(some, v, torch.randint(1, max(v, 2), (n,), generator=g)).to(device),
            greedy=greedy.to(device),
            eta=torch.rand(n, generator=g).to(device, self.compute),
        )
        self.table = self.normal(v, d)
        self.w = torch.rand(n, generator=g).to(device, self.compute)
        self.tokens = torch.randint(0, v, (n,), generator=g).to(device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, the same whatever the dtype they are rounded to."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(
            self.device, dtype or self.compute
        )

    def begin(self, backend: str, updates: int | None = None) -> kernels.Guided:
        return kernels.begin(self.logits, self.params, backend=backend, updates=updates)

    def truth(self) -> kernels.Guided:
        """The float64 reference on exactly these inputs."""
        p = self.params
        wide = kernels.RowParams(p.tau.double(), p.top_p.double(), p.top_k, p.greedy, p.eta.double())
        return kernels.begin(self.logits.double(), wide, backend="reference")

    def keys(self, n: int | None = None, inner: int = 0, seed: int = 7) -> Tensor:
        position = torch.arange(n or self.n, device=self.device)
        zero = torch.zeros_like(position)
        return row_keys(zero + seed, zero, zero + 1, zero + 2, zero + inner, position)


@pytest.fixture
def make_case() -> type[Case]:
    return Case


def _assert_as_good_as_torch(actual: Tensor, plain: Tensor, truth: Tensor, floor: float = 4.0) -> None:
    """|actual - truth| at most 3 times plain torch's own error in the same dtype, plus `floor` units in the last place
    of the largest true value."""
    assert actual.shape == truth.shape
    truth = truth.double()
    error = (actual.double() - truth).abs().max()
    own = (plain.double() - truth).abs().max()
    unit = torch.finfo(actual.dtype).eps * truth.abs().max().clamp_min(1e-30)
    assert torch.isfinite(actual).all()
    assert error <= 3 * own + floor * unit, f"error {error:.3g}, plain torch's {own:.3g}, unit {unit:.3g}"


@pytest.fixture
def assert_as_good_as_torch():
    return _assert_as_good_as_torch
