"""SDAR: Qwen3's weights, trained to write block by block. Blocks are counted from position 0, so the first of a
response holds the end of its prompt too. Its mixture of experts (`SDARMoeForCausalLM`) is not implemented.
"""

from __future__ import annotations

from server.models.a2d import A2DQwen3Model


class SDARModel(A2DQwen3Model):
    """The SDAR family."""

    family = "sdar"
    architecture = "SDARForCausalLM"
    published = ("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-4B-Chat", "JetLM/SDAR-8B-Chat")
    blocks_from = "start"
    block_causal = True
    diffusion_defaults = {"algorithm": "maskgit_plus", "schedule": "even", "block_length": 4}  # noqa: RUF012
