"""LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors` in a folder.

An adapter changes a projection W to y = W x + s B (A x), with s = alpha / r (arXiv 2106.09685) or, with `use_rslora`,
s = alpha / sqrt(r) (arXiv 2312.03732). A diffusion model keeps W as it is, so that base and adapters share a batch
(`layers.Linear`); a reward model is merged with its adapter when it is loaded.

What would change the network in another way is refused by its key: whatever adapter_config.json holds that is not
PEFT's default and not implemented, targets outside the blocks, and tensors that do not fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from server.errors import ConfigurationError, quote
from server.hub import read_json
from server.models.base import DiffusionModel
from server.models.config import ConfigReader
from server.models.layers import Linear, compute_dtype
from server.models.weights import check_fit, read_tensor, stored_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SAVED_HEADS = ("classifier", "score")
"""What PEFT names in `modules_to_save` of a sequence classifier by itself, whichever of them there is."""

_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save"})
_OF_TRAINING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"}
    | {"peft_version", "revision", "task_type"}
)
"""Keys that say nothing about what the adapter computes."""
_DEFAULTS = {"bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}
"""PEFT's defaults of the others, where they are not null, false, [] or {}."""

Factors: TypeAlias = dict[nn.Linear, tuple[Tensor, Tensor]]
"""By projection its A (r, in) and its B (out, r), which holds the scale."""


class Adapter:
    """One version of an adapter, on one model's device in its weights' dtype. It lives as long as anybody has it."""

    def __init__(self, factors: Factors) -> None:
        self._factors = factors

    def get(self, projection: nn.Linear) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of a projection; None for one that stays as it is."""
        return self._factors.get(projection)


Run: TypeAlias = tuple[Adapter, slice]
"""An adapter, and neighbouring packed tokens that go through it."""


def load_adapter(model: DiffusionModel, folder: Path, max_rank: int) -> Adapter:
    """An adapter for a diffusion model, whose projections have the names that its family's checkpoints give them.
    Raises ConfigurationError, which names the key or the tensors."""
    closed = [_stored(model, "model.embed_tokens"), _stored(model, "lm_head")]
    factors, _ = read_weights(folder, projections(model), closed, model.dtype, model.device, max_rank=max_rank)
    return Adapter(factors)


def projections(model: DiffusionModel) -> dict[str, Linear]:
    """The products that an adapter may change, those in the blocks, by the names that checkpoints give them."""
    blocks = model.model.layers.named_modules(prefix="model.layers")
    return {_stored(model, name): module for name, module in blocks if isinstance(module, Linear)}


def adapter_bytes(model: DiffusionModel, rank: int) -> int:
    """Memory of an adapter of this rank on all projections."""
    return sum(rank * sum(each.weight.shape) * each.weight.itemsize for each in projections(model).values())


def read_config(folder: Path, max_rank: int | None = None) -> dict[str, Any]:
    """adapter_config.json, checked key by key. Raises ConfigurationError, which names the key."""
    raw = read_json(folder / CONFIG_FILE)
    read = ConfigReader(raw, CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise ConfigurationError(f"{CONFIG_FILE}: peft_type must be 'LORA', not {quote(raw.get('peft_type'))}")
    for key in sorted(raw.keys() - _READ - _OF_TRAINING):
        empty = (type(raw[key])(),) if isinstance(raw[key], bool | list | dict) else ()
        read.require(key, *((_DEFAULTS[key],) if key in _DEFAULTS else empty))
    rank = read.integer("r")
    if max_rank is not None and rank > max_rank:
        raise ConfigurationError(f"{CONFIG_FILE}: r = {rank} is more than max_lora_rank = {max_rank}")
    return raw


def read_weights(
    folder: Path,
    modules: Mapping[str, nn.Linear],
    closed: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    head: nn.Linear | None = None,
    max_rank: int | None = None,
) -> tuple[Factors, Tensor | None]:
    """An adapter's factors for some of `modules`, by their names in the base's checkpoint, in `dtype` on `device`;
    `closed` are names of modules that no adapter may change. Of a classifier's `head` also the whole weight, where the
    adapter holds one. Raises ConfigurationError, which names the key or the tensors."""
    raw = read_config(folder, max_rank)
    read = ConfigReader(raw, CONFIG_FILE)
    rank, alpha = read.integer("r"), read.number("lora_alpha", 8)
    scale = alpha / (sqrt(rank) if read.flag("use_rslora", False) else rank)
    expected: dict[str, tuple[int, ...]] = {}
    pairs = {}
    for name in _targets(raw.get("target_modules"), modules, closed):
        down, up = (f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB")
        expected |= {down: (rank, modules[name].in_features), up: (modules[name].out_features, rank)}
        pairs[modules[name]] = down, up
    saved = f"{PREFIX}score.weight"
    if head is None:
        read.require("modules_to_save", [])
    elif "score" in saved_modules(raw):
        expected[saved] = tuple(head.weight.shape)
    stored = stored_tensors(folder, WEIGHTS_FILE)
    check_fit(expected, stored, f"the tensors of {WEIGHTS_FILE} do not fit {CONFIG_FILE} and the model")

    def tensor(name: str, factor: float = 1.0) -> Tensor:
        # Multiplied even by 1: nothing that stays may be a view of the file, which the next version may write over.
        return (read_tensor(stored[name], name, compute_dtype(dtype)) * factor).to(device, dtype)

    factors: Factors = {module: (tensor(down), tensor(up, scale)) for module, (down, up) in pairs.items()}
    return factors, tensor(saved) if saved in expected else None


def base_of(path_or_id: str | Path) -> tuple[str | Path, Path | None]:
    """The base of a classifier's adapter and the adapter's folder; of anything else itself, and None. Raises
    ConfigurationError for an adapter that names no base."""
    folder = Path(path_or_id).expanduser()
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return path_or_id, None
    raw = read_config(folder)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(base, str) or not base:
        raise ConfigurationError(f"{CONFIG_FILE}: base_model_name_or_path must name a model, not {quote(base)}")
    return (f"{base}@{revision}" if revision else base), folder


def saved_modules(raw: Mapping[str, Any]) -> list[str]:
    """What a classifier's adapter holds whole. Raises ConfigurationError for anything but the head."""
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(name in SAVED_HEADS for name in saved):
        raise ConfigurationError(f"{CONFIG_FILE}: modules_to_save = {quote(saved)} is not supported, but for the head")
    return saved


def _stored(model: DiffusionModel, name: str) -> str:
    return model.stored_name(f"{name}.weight").removesuffix(".weight")


def _targets(targets: object, modules: Collection[str], closed: Collection[str]) -> list[str]:
    """The modules that `target_modules` names, by their last parts as PEFT matches them."""
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ConfigurationError(
            f"{CONFIG_FILE}: target_modules = {quote(targets)} is not supported; it must be a list of names of modules"
        )
    found = set()
    for target in targets:
        hit = {name for name in (*modules, *closed) if name == target or name.endswith(f".{target}")}
        if outside := sorted(hit.intersection(closed)):
            raise ConfigurationError(
                f"{CONFIG_FILE}: target_modules: {quote(target)} names {outside[0]}; an adapter may change the "
                "projections of the blocks only, not the embedding or the head"
            )
        if not hit:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
            message = f"{CONFIG_FILE}: target_modules: there is no {quote(target)}; the model has {known}"
            raise ConfigurationError(message)
        found |= hit
    return sorted(found)
