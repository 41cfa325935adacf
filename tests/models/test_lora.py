"""LoRA adapters: what a folder may hold, and that a mixed batch gives what the merged weights give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ConfigurationError
from server.models.base import DiffusionModel
from server.models.compiled import compiled_trunk
from server.models.graphs import GraphedTrunk
from server.models.loading import load_diffusion_model
from server.models.lora import Adapter, load_adapter
from server.models.packing import PackedLayout
from tests.support.graphs import again
from tests.support.lora import CONFIG, WEIGHTS, write_adapter, write_merged
from tests.support.models import FAMILIES, GOLDEN, diffusion

MAX_RANK = 8
LENGTHS = (5, 9, 4, 7, 6)
WHOSE = (None, 0, 0, 1, None)


def base_of(family: str) -> Path:
    return GOLDEN / f"{family}-tiny" / "dlm"


def batch(model: DiffusionModel, adapters: Any = ()) -> tuple[torch.Tensor, PackedLayout]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, model.vocab_size, (sum(LENGTHS),), generator=generator)
    return tokens, PackedLayout.of(LENGTHS, adapters=adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_what_each_rows_merged_weights_give(family: str, tmp_path: Path) -> None:
    base, model = base_of(family), diffusion(family).model
    wide = write_adapter(tmp_path / "wide", base, rank=4, seed=1)
    narrow = write_adapter(tmp_path / "narrow", base, rank=1, seed=2, only="q_proj", use_rslora=True)
    adapters = [load_adapter(model, folder, MAX_RANK) for folder in (wide, narrow)]
    written = [write_merged(folder / "merged", base, folder) for folder in (wide, narrow)]
    merged = [load_diffusion_model(folder, dtype=torch.float64) for folder in written]
    tokens, layout = batch(model, [None if who is None else adapters[who] for who in WHOSE])
    rows = torch.tensor([0, 3, 5, 13, 14, 17, 18, 24, 30])
    with torch.no_grad():
        everywhere = model.hidden(tokens, layout)
        some = model.masked_logits(tokens, layout, rows)
        starts = [sum(LENGTHS[:index]) for index in range(len(LENGTHS))]
        for start, length, who in zip(starts, LENGTHS, WHOSE, strict=True):
            alone = model if who is None else merged[who].model
            own, one = tokens[start : start + length], PackedLayout.of((length,))
            expected = alone.hidden(own, one)
            torch.testing.assert_close(everywhere[start : start + length], expected, rtol=1e-9, atol=1e-9)
            inside = (rows >= start) & (rows < start + length)
            torch.testing.assert_close(
                some[inside], alone.masked_logits(own, one, rows[inside] - start), rtol=1e-9, atol=1e-8
            )
        assert not torch.allclose(everywhere[5:14], model.hidden(*batch(model))[5:14], atol=1e-3)


def test_graphs_and_the_compiled_trunk_leave_batches_with_adapters_to_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusion("llada").model
    monkeypatch.setattr(model.model, "attention_backend", "reference")
    adapter = load_adapter(model, write_adapter(tmp_path, base_of("llada")), MAX_RANK)
    rows = torch.arange(len(LENGTHS))
    graphed = GraphedTrunk(model.plain_trunk, again)
    never = compiled_trunk(model.model, model.plain_trunk, backend=lambda *_: pytest.fail("compiled"))
    with torch.no_grad():
        for adapters, recorded in (([adapter] * len(LENGTHS), 0), ([None] * len(LENGTHS), 1)):
            tokens, layout = batch(model, adapters)
            expected = model.plain_trunk(tokens, layout, rows)
            torch.testing.assert_close(graphed(tokens, layout, rows), expected, rtol=1e-9, atol=1e-9)
            assert len(graphed.recorded.held) == recorded
            if not recorded:
                assert torch.equal(never(tokens, layout, rows), expected)


Changed = Callable[[dict[str, torch.Tensor]], object]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Changed:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"r": 16}, "r = 16 is more than max_lora_rank = 8"),
        ({"lora_alpha": "big"}, "lora_alpha must be a positive number"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"exclude_modules": "k_proj"}, "exclude_modules"),
        ({"a_key_of_the_future": 3}, "a_key_of_the_future"),
        ({"target_modules": ".*q_proj"}, "target_modules = '.*q_proj' is not supported; it must be a list"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' names lm_head; an adapter may change"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' names model.embed_tokens"),
        ({"target_modules": ["wq"]}, "there is no 'wq'; the model has down_proj, gate_proj, k_proj"),
        ({"target_modules": ["q_proj"]}, "unexpected: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
        ({"r": 4}, r"of the wrong shape: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight \[3, "),
    ],
)
def test_what_would_change_the_network_otherwise_is_refused_by_its_key(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, base_of("dream"), **config)
    with pytest.raises(ConfigurationError, match=words):
        load_adapter(diffusion("dream").model, folder, MAX_RANK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(FIRST), f"missing: {FIRST}"),
        (lambda tensors: tensors.update({"extra.lora_A.weight": torch.ones(1)}), "unexpected: extra.lora_A.weight"),
        (replaced(FIRST, lambda tensor: tensor.T.contiguous()), "of the wrong shape"),
        (replaced(FIRST, lambda tensor: tensor.to(torch.int8)), r"of a dtype other than .*lora_A.weight \(I8\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Changed, words: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base_of("dream"))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigurationError, match=words):
        load_adapter(diffusion("dream").model, folder, MAX_RANK)


def test_names_are_the_familys_own_and_a_head_that_shares_one_is_no_target(tmp_path: Path) -> None:
    """LLaDA calls both its head and a projection `ff_out`."""
    folder = write_adapter(tmp_path, base_of("llada"), only="ff_out", target_modules=["ff_out"])
    with pytest.raises(ConfigurationError, match=r"'ff_out' names model\.transformer\.ff_out"):
        load_adapter(diffusion("llada").model, folder, MAX_RANK)
    config = json.loads((folder / CONFIG).read_text())
    full = [f"model.transformer.blocks.{block}.ff_out" for block in range(diffusion("llada").model.shape.layers)]
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": full}))
    assert isinstance(load_adapter(diffusion("llada").model, folder, MAX_RANK), Adapter)


def test_what_is_loaded_is_no_part_of_the_file(tmp_path: Path) -> None:
    """The next version may be written over it."""
    model = diffusion("dream", torch.float32).model
    adapter = load_adapter(model, write_adapter(tmp_path, base_of("dream"), lora_alpha=3), MAX_RANK)
    tokens, layout = batch(model, [adapter] * len(LENGTHS))
    with torch.no_grad():
        before = model.hidden(tokens, layout)
        path = tmp_path / WEIGHTS
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(model.hidden(tokens, layout), before)
