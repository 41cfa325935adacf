"""What several tests of reward models need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


@pytest.fixture
def exact_qwen3_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's RMSNorm rounds to float32 even inside a float64 model."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)
