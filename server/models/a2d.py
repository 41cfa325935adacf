"""A2D, dLLM's conversions of autoregressive models: the weights and names of Qwen3, Qwen2 or Llama, bidirectional.

Unlike Dream, which was made in the same way, the network predicts the position that it reads: logits are in place.
The mask token is one that the conversion added to the tokenizer.
"""

from __future__ import annotations

from typing import ClassVar

from server.models.base import DiffusionModel
from server.models.layers import Variant

_PLAIN: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
}


class A2DLlamaModel(DiffusionModel):
    """A converted Llama."""

    family = "a2d-llama"
    architecture = "A2DLlamaLMHeadModel"
    fixed = {**_PLAIN, "attention_bias": (False,), "mlp_bias": (False,)}  # noqa: RUF012
    diffusion_defaults = {"algorithm": "maskgit_plus", "schedule": "even", "block_length": 32}  # noqa: RUF012


class A2DQwen2Model(A2DLlamaModel):
    """A converted Qwen2 or Qwen2.5."""

    family = "a2d-qwen2"
    architecture = "A2DQwen2LMHeadModel"
    published: ClassVar[tuple[str, ...]] = (
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
    )
    block_lengths = {published[1]: 32}  # noqa: RUF012
    variant = Variant(qkv_bias=True)
    template_arguments = {"enable_thinking": False}  # noqa: RUF012
    fixed = _PLAIN


class A2DQwen3Model(A2DQwen2Model):
    """A converted Qwen3, whose chat template would begin with a chain of thought."""

    family = "a2d-qwen3"
    architecture = "A2DQwen3LMHeadModel"
    published: ClassVar[tuple[str, ...]] = (
        "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
    )
    block_lengths = {published[1]: 32}  # noqa: RUF012
    variant = Variant(head_norms=True)
    fixed = {**_PLAIN, "attention_bias": (False,)}  # noqa: RUF012
