"""Safetensors into a module, tensor by tensor: memory-mapped, onto the device, never twice in RAM.

The headers come first: every name and shape of the checkpoint is held against the module's, and whatever is missing,
left over or of another shape is listed at once, before any data is read.
On the CPU in the stored dtype a weight *is* the mapped file: nothing is copied, pages come in when first used and the
kernel shares them with other processes. Otherwise each tensor is mapped, converted onto the device and unmapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from server.errors import ConfigurationError, quote
from server.hub import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_LISTED = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place and form, from a header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _indexed_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file by a sharded checkpoint's index."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(f"{folder.name}: {INDEX_FILE} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConfigurationError(f"{folder.name}: {INDEX_FILE} names {quote(shard)}, not a safetensors file beside")
    if absent := sorted(shard for shard in set(weight_map.values()) if not (folder / shard).is_file()):
        raise ConfigurationError(f"{folder.name}: shards are missing: {_listing(absent)}")
    return {name: folder / shard for name, shard in weight_map.items()}


def stored_tensors(folder: Path, single: str = SINGLE_FILE) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers alone: of the file `single`, or of the shards of an index.

    Raises ConfigurationError for files that are missing or damaged, saying so if only formats are there that can run
    code.
    """
    indexed, files = None, [folder / single]
    if single == SINGLE_FILE and (folder / INDEX_FILE).is_file():
        indexed = _indexed_files(folder)
        files = sorted(set(indexed.values()))
    elif not files[0].is_file():
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in UNSAFE_SUFFIXES)
        raise ConfigurationError(
            f"{folder.name}: {unsafe[0]} is a pickle format, which can run code and is never loaded; "
            f"convert the weights to {single}"
            if unsafe
            else f"{folder.name}: neither {single} nor {INDEX_FILE} is there"
        )
    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    part = file.get_slice(name)
                    if indexed is None or indexed.get(name) == path:
                        found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{folder.name}: {path.name} is damaged: {error}") from error
    if lost := sorted(set(indexed or ()) - set(found)):
        raise ConfigurationError(f"{folder.name}: the shards lack tensors that the index promises: {_listing(lost)}")
    return found


def checkpoint_dtype(folder: Path) -> torch.dtype | None:
    """The type that config.json gives the weights, else the one that most of them are stored in; None for any that is
    not loaded. Weights may be stored in fewer bits than they are meant for, as those of the bundled models are."""
    config = read_json(folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        return next((dtype for dtype in STORED_DTYPES.values() if str(dtype) == f"torch.{named}"), None)
    stored = [tensor.dtype for tensor in stored_tensors(folder).values()]
    return STORED_DTYPES.get(max(set(stored), key=stored.count, default=""))


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ignored: Iterable[str] = (),
    stored_name: Callable[[str], str] = str,
) -> None:
    """Give a module on the meta device its weights, in `dtype` on `device`. They come out frozen, in eval mode.

    `stored_name` gives the name that a parameter has in the checkpoint; `ignored` names may be left over there.

    Raises ConfigurationError when the checkpoint is damaged, or with lists of the tensors that are missing, unexpected,
    of another shape or no floats.
    """
    names = {name: stored_name(name) for name in module.state_dict()}
    expected = {names[name]: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stored = stored_tensors(folder)
    check_fit(expected, stored, "the checkpoint's tensors do not fit config.json", ignored)
    weights = {ours: read_tensor(stored[name], name, dtype, torch.device(device)) for ours, name in names.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    module.requires_grad_(False).eval()


def check_fit(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    complaint: str,
    ignored: Iterable[str] = (),
) -> None:
    """Hold the stored tensors against the names and shapes that are `expected`. Raises ConfigurationError: the
    complaint, with lists of the tensors that are missing, unexpected, of another shape or no floats."""
    common = sorted(expected.keys() & stored)
    problems = {
        "missing": sorted(expected.keys() - stored),
        "unexpected": sorted(stored.keys() - expected - set(ignored)),
        "of the wrong shape": [
            f"{name} {list(stored[name].shape)} instead of {list(expected[name])}"
            for name in common
            if stored[name].shape != expected[name]
        ],
        f"of a dtype other than {', '.join(STORED_DTYPES)}": [
            f"{name} ({stored[name].dtype})" for name in common if stored[name].dtype not in STORED_DTYPES
        ],
    }
    if found := "; ".join(f"{kind}: {_listing(names)}" for kind, names in problems.items() if names):
        raise ConfigurationError(f"{complaint}; {found}")


def read_tensor(stored: StoredTensor, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The tensor of that name, in `dtype` on `device`."""
    # Opened anew for each tensor: a mapping lives as long as any tensor of it, so that the pages of converted tensors
    # would otherwise stay resident until the whole file is done.
    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.to(device, dtype)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
