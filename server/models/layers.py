"""What both families share below the block: projections, the norm, the rotary embedding and SwiGLU.

Inference in float32 on a CPU takes the fused passes of `kernels.blocks`; everything else, training included, the
plain expressions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import blocks
from kernels.linear import activation_dtype, linear


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where norms and rotations compute: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fused(x: Tensor) -> bool:
    """Whether the fused passes take x. Nothing here keeps what a gradient would need; a compiler fuses by itself."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and blocks.runs(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (N, m) each; may write into `gate`."""
    return blocks.swiglu_apart(gate, up) if fused(gate) else functional.silu(gate) * up


class Linear(nn.Linear):
    """A projection that takes activations wider than its weight (see `kernels.linear`)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch gives it)
        """(N, in) -> (N, out) in the input's dtype."""
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Token embeddings, in the dtype that the network computes in."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch gives it)
        """(S,) int64 -> (S, d)."""
        return super().forward(input).to(self.activation_dtype)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The weight's dtype, or float32 where this device has no instructions for it."""
        return activation_dtype(self.weight.dtype, self.weight.device)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 at least, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if fused(x):
            return blocks.rms_norm(x, self.weight.to(x.dtype), self.eps)
        exact = x.to(compute_dtype(x.dtype))
        return functional.rms_norm(exact, self.weight.shape, self.weight.to(exact.dtype), self.eps).to(x.dtype)


class RotaryTable:
    """Cosines and sines of position * theta^(-2i/d), i < d/2, one table per (dtype, device), grown on demand.

    Computed in float64 and rounded once, so that far positions lose nothing. Not a module: it holds no weights.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self._head_dim = head_dim
        self._theta = theta
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def rows(self, positions: Tensor, max_length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (S, 1, d/2), for `positions` (S,) int64, all below `max_length`; float32 or float64."""
        key = (compute_dtype(dtype), positions.device)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < max_length:
            table = self._build(1 << (max_length - 1).bit_length(), *key)
            self._tables[key] = table
        cos, sin = table
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def _build(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        # An inference tensor in the table would break a later training forward.
        with torch.inference_mode(False), torch.no_grad():
            exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float64) / self._head_dim
            angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * self._theta**-exponents
            return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (S, heads, d), pairing channel i with i + d/2, by tables (S, 1, d/2); x's dtype comes back."""
    if fused(x):
        heads = x.shape[1]
        return blocks.split_heads(x.flatten(1), heads, 0, None, None, 0.0, cos[:, 0], sin[:, 0])[0]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def initialise(module: nn.Module, std: float, seed: int) -> None:
    """Fresh weights for training: matrices normal with `std`, norms one, biases zero. Seeded on the weights' device."""
    generator = torch.Generator(device=next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
