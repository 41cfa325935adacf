"""A2D models against stock transformers with full attention, on checkpoints as transformers writes them."""

import json
import shutil

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.errors import ConfigurationError
from server.models.loading import load_diffusion_model
from server.models.packing import PackedLayout
from tests.support.models import GOLDEN
from tests.support.rewards import edit_json

SIZES = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
         "initializer_range": 0.2}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = PLAIN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 16}  # fmt: skip
ORIGINS = {
    "A2DLlamaLMHeadModel": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3)),
    "A2DQwen2LMHeadModel": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=PLAIN, tie_word_embeddings=True)),
    "A2DQwen3LMHeadModel": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, rope_parameters=PLAIN)),
}


@pytest.mark.parametrize("architecture", ORIGINS)
@pytest.mark.parametrize("older", [False, True])
def test_logits_are_those_of_the_origin_with_full_attention(architecture, older, tmp_path):
    build, config = ORIGINS[architecture]
    torch.manual_seed(0)
    origin = build(config).double().eval()
    for parameter in origin.parameters():
        if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    shutil.copytree(GOLDEN / "a2d-qwen3-tiny" / "dlm", tmp_path, dirs_exist_ok=True)
    origin.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=[architecture])
    if older:
        rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
        scaling = None if rope["rope_type"] == "default" else rope
        edit_json(
            tmp_path / "config.json", rope_theta=rope.pop("rope_theta"), rope_scaling=scaling, rope_parameters=None
        )
    model = load_diffusion_model(tmp_path, dtype=torch.float64).model
    tokens = torch.randint(0, 512, (40,))
    with torch.no_grad():
        expected = origin(tokens[None], attention_mask=torch.zeros(1, 1, 40, 40, dtype=torch.float64)).logits[0]
        found = model.masked_logits(tokens, PackedLayout.of([40]), torch.arange(40))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("token", ["<|mask|>", "<|MASK|>"])
def test_the_mask_token_is_the_tokenizers(token, tmp_path):
    folder = shutil.copytree(GOLDEN / "a2d-qwen2-tiny" / "dlm", tmp_path / "model")
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("<|mask|>", token))
    info = load_diffusion_model(folder).info
    assert (info.mask_token_id, info.default_max_tokens) == (3, 128)
    assert info.diffusion_defaults == {"algorithm": "maskgit_plus", "schedule": "even", "block_length": 32}
    assert info.template_arguments == {"enable_thinking": False}


BLOCKS = {"attention": "block_causal"}


@pytest.mark.parametrize(
    ("name", "config", "settings", "expected"),
    [
        ("a2d-qwen3", {}, {}, (None, 32)),
        ("a2d-qwen3", {}, {"block_length": 16}, (None, 16)),
        ("a2d-qwen3", {}, BLOCKS, ("prompt_end", 32)),
        ("a2d-qwen3", {"block_size": 8}, {}, ("prompt_end", 8)),
        ("a2d-qwen3", {"block_size": 8}, BLOCKS | {"block_length": 16}, ("prompt_end", 16)),
        ("a2d-qwen3", {"block_size": 8}, {"attention": "full"}, (None, 32)),
        ("llada", {}, BLOCKS | {"block_length": 16}, ("prompt_end", 16)),
        ("sdar", {}, {}, ("start", 4)),
        ("sdar", {"block_length": 16}, {}, ("start", 16)),
        ("sdar", {}, {"attention": "full"}, (None, 4)),
    ],
)
def test_attention_and_blocks_are_what_settings_checkpoint_and_family_say(name, config, settings, expected, tmp_path):
    folder = shutil.copytree(GOLDEN / f"{name}-tiny" / "dlm", tmp_path / "model")
    edit_json(folder / "config.json", **config)
    info = load_diffusion_model(folder, **settings).info
    assert (info.blocks_from, info.diffusion_defaults["block_length"]) == expected
    if info.blocks_from:
        assert info.diffusion_defaults["schedule"] == "even"


@pytest.mark.parametrize(("value", "words"), [("8", "block_size must be"), (0, "block_size must be")])
def test_a_wrong_block_size_is_named(value, words, tmp_path):
    folder = shutil.copytree(GOLDEN / "sdar-tiny" / "dlm", tmp_path / "model")
    edit_json(folder / "config.json", block_size=value)
    with pytest.raises(ConfigurationError, match=words):
        load_diffusion_model(folder)
