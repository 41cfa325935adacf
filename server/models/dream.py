"""Dream (Dream-v0, Dream-Coder, DiffuCoder): Qwen2 blocks, bidirectional, with shifted logits.

Dream was made from an autoregressive model, hence the shift: the output at i - 1 predicts position i.
"""

from __future__ import annotations

from server.models.base import DiffusionModel
from server.models.layers import Variant


class DreamModel(DiffusionModel):
    """The Dream family."""

    family = "dream"
    architecture = "DreamModel"
    published = (
        "Dream-org/Dream-v0-Instruct-7B",
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-Coder-v0-Instruct-7B",
        "apple/DiffuCoder-7B-Instruct",
    )
    shifts = True
    variant = Variant(qkv_bias=True)
    fixed = {"hidden_act": ("silu",), "use_sliding_window": (False,), "attention_dropout": (0, 0.0)}  # noqa: RUF012
