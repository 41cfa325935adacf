"""Adapters as PEFT writes them, made of random numbers, and models with an adapter's products in their weights."""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUTSIDE = ("embed_tokens", "wte", "lm_head", "transformer.ff_out", "score")


def projections(base: Path) -> dict[str, Tensor]:
    """The matrices of a checkpoint's blocks by module name, read off the file."""
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    return {name: each for name, each in tensors.items() if each.ndim == 2 and not name.endswith(OUTSIDE)}


def write_adapter(folder: Path, base: Path, *, rank: int = 3, seed: int = 1, only: str = "", **config: Any) -> Path:
    """A random adapter of a checkpoint's blocks, of all their matrices or those named `only`, and its configuration
    with changes."""
    generator = torch.Generator().manual_seed(seed)
    modules = {name: each for name, each in projections(base).items() if name.endswith(only)}
    tensors = {}
    for name, weight in modules.items():
        out, into = weight.shape
        for letter, shape in (("A", (rank, into)), ("B", (out, rank))):
            factor = torch.randn(shape, generator=generator) / sqrt(shape[1]) / 2
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = factor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    # LLaDA's head has the name of a projection, which alone would mean the head too.
    targets = {name if name.endswith("ff_out") else name.rpartition(".")[2] for name in modules}
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05,
        "bias": "none", "use_rslora": False, "target_modules": sorted(targets),
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(written | config))
    return folder


def write_merged(folder: Path, base: Path, adapter: Path) -> Path:
    """The checkpoint with W + s B A in the place of each W, added up in float64."""
    config, factors = json.loads((adapter / CONFIG).read_text()), load_file(adapter / WEIGHTS)
    scale = config["lora_alpha"] / (sqrt(config["r"]) if config["use_rslora"] else config["r"])
    shutil.copytree(base, folder)
    weights = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    for name, up in factors.items():
        module, is_up, _ = name.removeprefix("base_model.model.").partition(".lora_B.")
        if is_up:
            weights[f"{module}.weight"] += scale * up.double() @ factors[name.replace("lora_B", "lora_A")].double()
    save_file(weights, folder / "model.safetensors")
    return folder
