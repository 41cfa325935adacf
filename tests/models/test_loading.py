"""Loading checkpoints: layouts, dtypes, special ids, what is refused and with which words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from server.errors import ConfigurationError
from server.models.loading import load_diffusion_model
from server.models.registry import PUBLISHED
from server.models.weights import checkpoint_dtype
from tests.support.models import FAMILIES, GOLDEN
from tests.support.rewards import edit_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    return Path(shutil.copytree(GOLDEN / f"{request.param}-tiny" / "dlm", tmp_path / "model"))


@pytest.fixture
def dream(tmp_path):
    return Path(shutil.copytree(GOLDEN / "dream-tiny" / "dlm", tmp_path / "model"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def shard(folder, count=3):
    """Split model.safetensors into shards with an index."""
    tensors = weights(folder)
    names = sorted(tensors)
    weight_map = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return weight_map


def state(model):
    """By the names that the checkpoint has."""
    return {model.stored_name(name): tensor for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_single_file_gives_its_own_tensors_frozen(checkpoint):
    loaded = load_diffusion_model(checkpoint)
    assert_same(state(loaded.model), weights(checkpoint))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_shards_equal_the_single_file(checkpoint):
    single = weights(checkpoint)
    shard(checkpoint)
    assert_same(state(load_diffusion_model(checkpoint).model), single)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_stored_dtype_comes_out_in_the_wanted_one(dream, stored, wanted):
    original = weights(dream)
    save_file({name: tensor.to(stored) for name, tensor in original.items()}, dream / "model.safetensors")
    loaded = load_diffusion_model(dream, dtype=wanted)
    assert loaded.model.dtype == wanted
    assert loaded.info.dtype == str(wanted).removeprefix("torch.")
    assert_same(state(loaded.model), {name: tensor.to(stored).to(wanted) for name, tensor in original.items()})


def test_a_checkpoints_own_dtype_is_what_its_config_says_else_what_it_is_stored_in(dream):
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in weights(dream).items()}, dream / "model.safetensors")
    for keys, expected in (
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": None, "torch_dtype": None}, torch.bfloat16),
        ({"dtype": "int8"}, None),
    ):
        edit_json(dream / "config.json", **{"dtype": None} | keys)
        assert checkpoint_dtype(dream) == expected


def test_tied_embeddings_are_one_parameter(checkpoint):
    llada = "llada" in json.loads((checkpoint / "config.json").read_text())["model_type"]
    embedding, head, key = (
        ("model.transformer.wte.weight", "model.transformer.ff_out.weight", "weight_tying")
        if llada
        else ("model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings")
    )
    tensors = weights(checkpoint)
    tensors[head] = tensors[embedding].flip(0)
    save_file(tensors, checkpoint / "model.safetensors")
    edit_json(checkpoint / "config.json", **{key: False})
    untied = load_diffusion_model(checkpoint, dtype=torch.float64).model
    edit_json(checkpoint / "config.json", **{key: True})
    stored_twice = load_diffusion_model(checkpoint, dtype=torch.float64).model
    del tensors[head]
    save_file(tensors, checkpoint / "model.safetensors")
    stored_once = load_diffusion_model(checkpoint, dtype=torch.float64).model
    hidden = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hidden @ tensors[embedding].double().T
    for model in (stored_twice, stored_once):
        assert head not in state(model)
        torch.testing.assert_close(model.head(hidden), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(untied.head(hidden), expected)


MEMORY = """
import sys, torch
from server.models.loading import load_diffusion_model

def resident(*keys):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(fields[key].split()[0]) // 1024 for key in keys]

small, large = sys.argv[1:]
for dtype in (torch.float32, torch.bfloat16):
    load_diffusion_model(small, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    own, every = resident("RssAnon", "VmRSS")
    loaded = load_diffusion_model(large, dtype=dtype)
    own_after, peak = resident("RssAnon", "VmHWM")
    print(own_after - own, peak - every)
    del loaded
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_no_second_copy_in_memory(dream):
    """A 66 MB checkpoint: mapped as it is in its own dtype, one converted copy (33 MB) otherwise; never both."""
    tensors = weights(dream)
    rows = 128_000
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(rows, 64)
    save_file(tensors, dream / "model.safetensors")
    edit_json(dream / "config.json", vocab_size=rows)
    command = [sys.executable, "-c", MEMORY, str(GOLDEN / "llada-tiny" / "dlm"), str(dream)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (own, peak), (own_converted, peak_converted) = (map(int, line.split()) for line in run.stdout.splitlines())
    assert own < 8
    assert peak < 8
    assert 24 < own_converted < 40
    assert peak_converted < 33 + 33 + 8  # the copy, and one of the two large tensors mapped while it is converted


def test_every_tensor_that_does_not_fit_is_named(checkpoint):
    tensors = weights(checkpoint)
    gone, short, *_ = sorted(tensors)
    del tensors[gone]
    tensors[short] = tensors[short][:-1].clone()
    tensors["surplus.weight"] = torch.zeros(2)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ConfigurationError) as caught:
        load_diffusion_model(checkpoint)
    message = caught.value.message
    assert f"missing: {gone};" in message
    assert "unexpected: surplus.weight;" in message
    assert f"of the wrong shape: {short} [" in message


def test_long_lists_are_cut(dream):
    edit_json(dream / "config.json", num_hidden_layers=4)
    with pytest.raises(ConfigurationError, match=r"missing: model\.layers\.2.* and 16 more"):
        load_diffusion_model(dream)


def test_quantised_tensors_are_refused(dream):
    tensors = weights(dream)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, dream / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"lm_head.weight \(I8\)"):
        load_diffusion_model(dream)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / name)

    return change


def without_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def with_a_promise(folder):
    weight_map = shard(folder)
    index = {"weight_map": weight_map | {"model.extra": weight_map["lm_head.weight"]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((pickled(name), f"{name} is a pickle format") for name in ("pytorch_model.bin", "pool.pth", "model.pt")),
        (lambda folder: (folder / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
        (cut_short, r"model\.safetensors is damaged"),
        (without_a_shard, r"shards are missing: model-00002-of-00003\.safetensors"),
        (with_a_promise, r"lack tensors that the index promises: model\.extra"),
        (lambda folder: (folder / "config.json").write_bytes(b"{"), r"config\.json"),
        (lambda folder: (folder / "config.json").write_bytes(b"[]"), r"config\.json"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json"),
    ],
)
def test_files_that_are_not_whole_are_refused_by_name(dream, change, words):
    change(dream)
    with pytest.raises(ConfigurationError, match=words):
        load_diffusion_model(dream)


@pytest.mark.parametrize("shard_name", ["../model.safetensors", "/etc/model.safetensors", "weights.bin", 7])
def test_an_index_cannot_point_outside_or_to_another_format(dream, shard_name):
    weight_map = shard(dream)
    index = dream / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": shard_name}}))
    with pytest.raises(ConfigurationError, match="not a safetensors file beside"):
        load_diffusion_model(dream)


def test_code_of_a_checkpoint_never_runs(dream, tmp_path):
    witness = tmp_path / "ran"
    for name in ("configuration_dream", "modeling_dream", "tokenization_dream"):
        (dream / f"{name}.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    edit_json(dream / "config.json", auto_map=auto_map)
    edit_json(dream / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]})
    assert load_diffusion_model(dream).info.family == "dream"
    assert not witness.exists()


def test_facts_of_a_checkpoint(checkpoint):
    info = load_diffusion_model(checkpoint).info
    assert info.id == "model"
    assert info.family in FAMILIES
    assert (info.context_length, info.vocab_size) == (2048, 512)
    assert (info.mask_token_id, info.eos_token_id, info.pad_token_id) == (3, 0, 0)
    assert info.stop_token_ids == (0, 2)  # <|endoftext|> and <|im_end|>
    assert info.default_max_tokens == 128
    assert Path(info.tokenizer_path) == checkpoint


def test_ids_come_from_config_then_generation_config_then_tokenizer(dream):
    edit_json(dream / "config.json", mask_token_id=3, eos_token_id=5, pad_token_id=None)
    edit_json(dream / "generation_config.json", mask_token_id=9, eos_token_id=6, pad_token_id=7)
    info = load_diffusion_model(dream).info
    assert (info.mask_token_id, info.eos_token_id, info.pad_token_id) == (3, 5, 7)
    edit_json(dream / "config.json", mask_token_id=None, eos_token_id=None)
    edit_json(dream / "generation_config.json", mask_token_id=None, pad_token_id=None)
    loaded = load_diffusion_model(dream)
    info = loaded.info
    assert (info.mask_token_id, info.eos_token_id, info.pad_token_id) == (3, 6, 0)  # the tokenizer's mask and pad
    assert loaded.model.mask_token_id == 3
    edit_json(dream / "config.json", eos_token_id=[4, 8])
    info = load_diffusion_model(dream).info
    assert (info.eos_token_id, info.stop_token_ids) == (4, (4, 8, 2))


@pytest.mark.parametrize(("key", "token"), [("mask_token_id", "mask_token"), ("pad_token_id", "pad_token"),
                                            ("eos_token_id", "eos_token")])  # fmt: skip
def test_a_missing_id_is_named(dream, key, token):
    for file in ("config.json", "generation_config.json"):
        edit_json(dream / file, **{key: None})
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(dream / file, **{token: None})
    with pytest.raises(ConfigurationError, match=f"has {key}"):
        load_diffusion_model(dream)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token_id": 512}, "mask_token_id = 512 is outside"),
        ({"eos_token_id": [600]}, "eos_token_id = 600 is outside"),
        ({"pad_token_id": -1}, "pad_token_id must be a token id"),
        ({"eos_token_id": True}, "eos_token_id must be a token id"),
        ({"mask_token_id": [3, 4]}, "mask_token_id must be one id"),
        ({"mask_token_id": 0}, "mask_token_id and eos_token_id are both 0"),
    ],
)
def test_a_wrong_id_is_named(dream, changes, words):
    edit_json(dream / "config.json", **changes)
    with pytest.raises(ConfigurationError, match=words):
        load_diffusion_model(dream)


def test_a_tokenizer_wider_than_the_model_is_refused(dream):
    tensors = weights(dream)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:500].clone()
    save_file(tensors, dream / "model.safetensors")
    edit_json(dream / "config.json", vocab_size=500)
    with pytest.raises(ConfigurationError, match="the model only 500"):
        load_diffusion_model(dream)


def test_the_default_canvas(dream):
    edit_json(dream / "generation_config.json", max_new_tokens=48)
    assert load_diffusion_model(dream).info.default_max_tokens == 48
    edit_json(dream / "config.json", max_position_embeddings=64)
    assert load_diffusion_model(dream).info.default_max_tokens == 32
    edit_json(dream / "generation_config.json", max_new_tokens="many")
    with pytest.raises(ConfigurationError, match="max_new_tokens"):
        load_diffusion_model(dream)


@pytest.mark.parametrize("name", ["dream", "/no/such/folder", "a/b/c", "https://host/x", "owner/../x", ""])
def test_a_wrong_name_is_refused_with_the_list(name):
    with pytest.raises(ConfigurationError) as caught:
        load_diffusion_model(name)
    assert PUBLISHED in caught.value.message


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache, offline, with two commits of owner/tiny; `main` is the second."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--tiny"
    commits = ["1" * 40, "2" * 40]
    for commit in commits:
        shutil.copytree(GOLDEN / "dream-tiny" / "dlm", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots"


@pytest.mark.parametrize(("revision", "commit"), [("", "2" * 40), ("@" + "1" * 40, "1" * 40)])
def test_a_hub_id_is_the_main_branch_unless_it_is_pinned(hub, revision, commit):
    info = load_diffusion_model(f"owner/tiny{revision}").info
    assert (info.id, info.tokenizer_path) == ("owner/tiny", str(hub / commit))


def test_a_hub_model_of_another_kind_is_refused_by_its_config(hub):
    edit_json(hub / ("2" * 40) / "config.json", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ConfigurationError, match="Qwen2ForCausalLM"):
        load_diffusion_model("owner/tiny")


def test_what_the_hub_does_not_have_is_refused_with_the_list(hub):
    with pytest.raises(ConfigurationError, match=r"'owner/other' cannot be fetched from the hub.*LLaDA-8B-Instruct"):
        load_diffusion_model("owner/other")


def test_a_published_block_causal_model_is_known_by_its_id(hub):
    name = "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"
    repository = hub.parents[1] / f"models--{name.replace('/', '--')}"
    shutil.copytree(GOLDEN / "a2d-qwen3-tiny" / "dlm", repository / "snapshots" / ("3" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("3" * 40)
    info = load_diffusion_model(name).info
    assert (info.blocks_from, info.diffusion_defaults["block_length"]) == ("prompt_end", 32)
