"""What a pass of a reward model keeps for its way back, on a pretended GPU, beside what the memory model counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.models import REWARDS, reward_model
from benchmarks.gpu.pretend import DEVICE, Pretend
from server.worker.memory import kept_bytes
from tests.support.models import diffusion

pytest.importorskip("triton")


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages that operators have made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for held, size in self._made.values() if not held.expired())


def test_a_pass_keeps_what_the_memory_model_counts() -> None:
    shape, own, cached, rows = REWARDS["1.7B"], 140, 90, 4
    with torch.no_grad(), Pretend(), Living() as living:
        model = reward_model(shape, diffusion("dream"), DEVICE)
        model.attention_backend = "varlen"
        prefix = model.prefill(range(cached))
        layout = model.layout([prefix] * rows, [own] * rows)
        layout = layout.hiding(torch.full((rows,), own - 3, device=DEVICE), layout.positions)
        embeds = torch.empty(rows * own, shape.hidden, dtype=torch.bfloat16, device=DEVICE)
        before = living.size
        _, back = model.read_with_gradient(layout, embeds)
        kept = living.size - before
        assert back().shape == embeds.shape
        laid_out = 4 * shape.layers * shape.key_heads * shape.head_size * cached
        assert kept == pytest.approx(rows * (own * kept_bytes(shape, 2, 4) + laid_out), rel=0.05)
        assert living.size - before < 0.05 * kept  # the way back lets it go
