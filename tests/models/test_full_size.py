"""Published sizes on the meta device: no weights, every tensor's name and shape accounted for.

The golden checkpoints have the published layout at tiny widths. Their headers, with layers counted on and each width
replaced by the published configuration's, give the tensors that a full-size checkpoint must have.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.full_size import DREAM_7B
from server.models.dream import DreamModel
from server.models.llada import LLaDAModel
from server.models.registry import family_of

GOLDEN = Path(__file__).parents[1] / "golden"

# config.json of GSAI-ML/LLaDA-8B-Instruct.
LLADA_8B = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
    "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip

# Qwen3-1.7B with the one-label head of Skywork-Reward-V2-Qwen3-1.7B.
SKYWORK_1_7B = {
    "architectures": ["Qwen3ForSequenceClassification"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936, "pad_token_id": 151643,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
}  # fmt: skip

LAYER = re.compile(r"(layers|blocks)\.(\d+)\.")


def full_size_tensors(golden, widths, layers):
    """Tensor name -> shape at full size, from a golden checkpoint's header. `widths`: tiny width -> full width."""
    expected = {}
    with safe_open(GOLDEN / golden / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = tuple(widths[size] for size in file.get_slice(name).get_shape())
            for layer in range(layers) if LAYER.search(name) else [0]:
                expected[LAYER.sub(rf"\1.{layer}.", name)] = shape
    return expected


def shapes(module):
    name_of = getattr(module, "stored_name", str)
    return {name_of(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_dream_7b():
    with torch.device("meta"):
        model = DreamModel(DreamModel.read_config(DREAM_7B))
    assert family_of(DREAM_7B) is DreamModel
    widths = {512: 152064, 64: 3584, 192: 18944, 32: 4 * 128}
    assert shapes(model) == full_size_tensors("dream-tiny/dlm", widths, layers=28)
    assert len(model.state_dict()) == 339  # as many as the index of the published Qwen2.5-7B, its origin, has
    assert parameters(model) == 7_615_616_512  # 15,231,233,024 bytes in bfloat16, that index's total
    assert model.context_length == 131072


def test_llada_8b():
    with torch.device("meta"):
        model = LLaDAModel(LLaDAModel.read_config(LLADA_8B))
    assert family_of(LLADA_8B) is LLaDAModel
    widths = {512: 126464, 64: 4096, 160: 12288}
    assert shapes(model) == full_size_tensors("llada-tiny/dlm", widths, layers=32)
    assert parameters(model) * 2 == 16_031_162_368  # total_size in the published index, bfloat16
    assert model.context_length == 4096


def test_skywork_1_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SKYWORK_1_7B))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    widths = {511: 151936, 48: 2048, 144: 6144, 24: 8 * 128, 12: 128, 1: 1}
    assert shapes(model) == full_size_tensors("dream-tiny/rm", widths, layers=28)
    assert parameters(model) == 1_720_574_976 + 2048  # Qwen3-1.7B as published, and the score head


@pytest.mark.parametrize("family", ["dream-tiny", "llada-tiny"])
def test_the_derivation_at_golden_size_is_the_golden_header(family):
    """The helper above, with nothing scaled, gives the header back: it neither drops nor invents a tensor."""
    sizes = (512, 64, 192, 160, 32)
    derived = full_size_tensors(f"{family}/dlm", {size: size for size in sizes}, layers=2)
    with safe_open(GOLDEN / family / "dlm" / "model.safetensors", framework="pt") as file:
        assert derived == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
