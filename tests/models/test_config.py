"""What config.json may say: everything that changes the network is honoured or refused by name."""

import json

import pytest

from server.errors import ConfigurationError
from server.models.dream import DreamModel
from server.models.llada import LLaDAModel
from server.models.registry import FAMILIES, family_of
from tests.support.models import GOLDEN

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def raw(family, **changes):
    if family == "a2d-llama":  # which has no folder
        family, changes = "a2d-qwen2", {"architectures": ["A2DLlamaLMHeadModel"]} | changes
    config = json.loads((GOLDEN / f"{family}-tiny" / "dlm" / "config.json").read_text())
    return config | changes


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("dream", "hidden_act", "gelu"),
        ("dream", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("dream", "rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
        ("dream", "rope_parameters", {"rope_theta": 10000.0, "factor": 2.0}),
        ("dream", "quantization_config", {"bits": 4}),
        ("dream", "use_sliding_window", True),
        ("dream", "layer_types", ["full_attention", "sliding_attention"]),
        ("dream", "attention_dropout", 0.1),
        ("dream", "head_dim", 33),
        ("dream", "vocab_size", None),
        ("dream", "hidden_size", "64"),
        ("dream", "hidden_size", 62),
        ("dream", "num_hidden_layers", 0),
        ("dream", "num_hidden_layers", True),
        ("dream", "num_key_value_heads", 3),
        ("dream", "rms_norm_eps", 0.0),
        ("dream", "rope_theta", float("inf")),
        ("dream", "tie_word_embeddings", "yes"),
        ("dream", "max_position_embeddings", None),
        ("a2d-qwen3", "attention_bias", True),
        ("a2d-qwen3", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("a2d-qwen3", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("a2d-qwen3", "rope_scaling", LLAMA3 | {"low_freq_factor": 4.0}),
        ("a2d-qwen3", "rope_scaling", LLAMA3 | {"beta_fast": 32}),
        ("a2d-qwen3", "rope_parameters", "llama3"),
        ("a2d-qwen2", "use_sliding_window", True),
        ("a2d-llama", "mlp_bias", True),
        ("llada", "alibi", True),
        ("llada", "rope", False),
        ("llada", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llada", "quantization_config", {"bits": 8}),
        ("llada", "block_type", "sequential"),
        ("llada", "activation_type", "swiglu"),
        ("llada", "layer_norm_type", "default"),
        ("llada", "layer_norm_with_affine", False),
        ("llada", "attention_layer_norm", True),
        ("llada", "include_bias", True),
        ("llada", "include_qkv_bias", True),
        ("llada", "bias_for_layer_norm", True),
        ("llada", "input_emb_norm", True),
        ("llada", "scale_logits", True),
        ("llada", "block_group_size", 2),
        ("llada", "clip_qkv", 8.0),
        ("llada", "residual_dropout", 0.1),
        ("llada", "embedding_size", 500),
        ("llada", "n_kv_heads", 3),
        ("llada", "d_model", 60),
        ("llada", "weight_tying", 1),
        ("llada", "max_sequence_length", None),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(family, key, value):
    config = raw(family, **{key: value})
    with pytest.raises(ConfigurationError, match=key):
        family_of(config).read_config(config)


def test_values_that_mean_off_are_accepted():
    config = raw(
        "dream", rope_scaling=None, sliding_window=131072, use_sliding_window=False, quantization_config=None,
        head_dim=16, layer_types=["full_attention"] * 2, attention_dropout=0,
    )  # fmt: skip
    assert DreamModel.read_config(config).head_size == 16


def test_rope_theta_in_either_place():
    assert DreamModel.read_config(raw("dream", rope_theta=5e5)).rope_theta == 5e5
    nested = raw("dream", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert DreamModel.read_config(nested).rope_theta == 1e6
    both = raw("dream", rope_parameters={"rope_theta": 1e6}, rope_scaling=LLAMA3)
    with pytest.raises(ConfigurationError, match="rope_scaling"):
        DreamModel.read_config(both)


def test_llada_derived_sizes():
    assert LLaDAModel.read_config(raw("llada", embedding_size=640)).vocab_size == 640
    assert LLaDAModel.read_config(raw("llada", embedding_size=None)).vocab_size == 512
    assert LLaDAModel.read_config(raw("llada", mlp_hidden_size=None, mlp_ratio=3)).intermediate == 192
    assert LLaDAModel.read_config(raw("llada", n_kv_heads=2)).key_heads == 2
    assert LLaDAModel.read_config(raw("llada", n_kv_heads=None)).key_heads == 4
    assert LLaDAModel.read_config(raw("llada", n_kv_heads=None, multi_query_attention=True)).key_heads == 1


@pytest.mark.parametrize("names", [["Qwen2ForCausalLM"], [], None, "DreamModel", ["DreamModel", "LLaDAModelLM"], [3]])
def test_another_architecture_is_refused_with_the_list(names):
    with pytest.raises(ConfigurationError) as caught:
        family_of({"architectures": names})
    assert all(family.architecture in caught.value.message for family in FAMILIES)
    assert all(name in caught.value.message for family in FAMILIES for name in family.published)
