"""Published sizes on the meta device: no weights, every tensor's name and shape accounted for.

The golden checkpoints have the published layout at tiny widths. Their headers, with layers counted on and each width
replaced by the published configuration's, give the tensors that a full-size checkpoint must have.
"""

import re

import pytest
import torch
from safetensors import safe_open

from benchmarks.full_size import DREAM_7B, QWEN3_0_6B
from server.models.a2d import A2DQwen2Model, A2DQwen3Model
from server.models.dream import DreamModel
from server.models.llada import LLaDAModel
from server.models.registry import family_of
from server.models.sdar import SDARModel
from tests.support.models import GOLDEN

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

# config.json of Qwen/Qwen2.5-Coder-0.5B-Instruct, under A2D's name.
QWEN2_5_0_5B = {
    "architectures": ["A2DQwen2LMHeadModel"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "a2d-qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936, "mask_token_id": 151665,
}  # fmt: skip

# config.json of JetLM/SDAR-1.7B-Chat, and what differs in the larger ones.
SDAR_1_7B = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}, "bos_token_id": 151643, "debug": False,
    "eos_token_id": 151643, "block_size": 4, "mask_token_id": 151669, "fuse_cross_entropy": True, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "sdar", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SDAR_LARGER = {"num_hidden_layers": 36, "num_attention_heads": 32, "max_window_layers": 36}

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


@pytest.mark.parametrize(
    ("family", "config", "tiny", "widths", "layers", "count", "context"),
    [
        # 15,231,233,024 bytes in bfloat16: the total in the index of the published Qwen2.5-7B, its origin
        (DreamModel, DREAM_7B, "dream", {512: 152064, 64: 3584, 192: 18944, 32: 4 * 128}, 28, 7_615_616_512, 131072),
        (LLaDAModel, LLADA_8B, "llada", {512: 126464, 64: 4096, 160: 12288}, 32, 16_031_162_368 // 2, 4096),  # the same
        # 440,467,456 without embeddings, the published 0.44 billion. 64 is also the width of the keys: 8 * 128
        (A2DQwen3Model, QWEN3_0_6B, "a2d-qwen3", {512: 151936, 64: 1024, 160: 3072, 128: 2048, 32: 128}, 28,
         596_049_920, 40960),
        # bytes of the published file
        (A2DQwen2Model, QWEN2_5_0_5B, "a2d-qwen2", {512: 151936, 64: 896, 160: 4864, 32: 128}, 24, 988_065_536 // 2,
         32768),
    ],
    ids=["dream 7B", "llada 8B", "qwen3 0.6B", "qwen2.5 0.5B"],
)  # fmt: skip
def test_all_tensors_of_a_published_model(family, config, tiny, widths, layers, count, context):
    with torch.device("meta"):
        model = family(family.read_config(config))
    assert family_of(config) is family
    expected = full_size_tensors(f"{tiny}-tiny/dlm", widths, layers)
    if tiny == "a2d-qwen2":
        del expected["lm_head.weight"]  # the tiny one is not tied
    assert shapes(model) == expected
    assert parameters(model) == count
    assert model.context_length == context


@pytest.mark.parametrize(
    ("changes", "billions"),  # without embedding and head, as published for the Qwen3 that each came from
    [
        ({}, 1.41),
        (SDAR_LARGER | {"hidden_size": 2560, "intermediate_size": 9728}, 3.63),
        (SDAR_LARGER | {"hidden_size": 4096, "intermediate_size": 12288}, 6.95),
    ],
    ids=["1.7B", "4B", "8B"],
)
def test_sdar(changes, billions):
    config = SDAR_1_7B | changes
    with torch.device("meta"):
        model = SDARModel(SDARModel.read_config(config))
    assert family_of(config) is SDARModel
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * 128
    widths = {512: 151936, 64: hidden, 160: config["intermediate_size"], 128: heads, 32: 128}
    expected = full_size_tensors("sdar-tiny/dlm", widths, config["num_hidden_layers"])
    expected |= {name: (8 * 128, hidden) for name in expected if re.search("[kv]_proj", name)}  # 64 in the tiny one too
    assert shapes(model) == expected
    assert round((parameters(model) - 2 * 151936 * hidden) / 1e9, 2) == billions
    assert model.context_length == 32768
