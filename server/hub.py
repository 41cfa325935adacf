"""Where a checkpoint is: a local folder, or a snapshot of a hub repository.

A hub model is `owner/name`, or `owner/name@revision` to pin it. Only weights in safetensors, JSON and text files are
fetched: no code, and nothing that unpickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from server.errors import ConfigurationError, quote

ALLOWED_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. ConfigurationError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path.parent.name}: {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path.parent.name}: {path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path.parent.name}: {path.name} must hold a JSON object")
    return value


def _local_folder(path_or_id: str | Path) -> Path | None:
    folder = Path(path_or_id).expanduser()
    return folder if str(path_or_id) and folder.is_dir() else None


def checkpoint_name(path_or_id: str | Path) -> str:
    """A local folder's own name, or a hub id without its revision."""
    folder = _local_folder(path_or_id)
    return str(path_or_id).partition("@")[0] if folder is None else folder.resolve().name


def resolve_checkpoint(
    path_or_id: str | Path, *, check_config: Callable[[Mapping[str, Any]], object], known: str = ""
) -> Path:
    """The local folder of a checkpoint, fetched from the hub unless it is one already.

    `check_config` gets the parsed config.json before any weight is fetched and raises to refuse it. `known` lists model
    names for the message of a wrong one. Raises ConfigurationError.
    """
    if (folder := _local_folder(path_or_id)) is not None:
        return folder
    match = _HUB_ID.fullmatch(str(path_or_id))
    hint = f"; known models: {known}" if known else ""
    if match is None:
        raise ConfigurationError(f"{quote(str(path_or_id))} is neither a folder nor a hub id (owner/name){hint}")
    repository, pinned = match.groups()
    # Files in subfolders are other formats of the same weights.
    fetch = partial(huggingface_hub.snapshot_download, repository, ignore_patterns=["*/*"])
    try:
        snapshot = Path(fetch(revision=pinned, allow_patterns=["config.json"]))
        check_config(read_json(snapshot / "config.json"))
        # By commit hash, so that both fetches see the same commit.
        return Path(fetch(revision=snapshot.name, allow_patterns=ALLOWED_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"{quote(repository)} cannot be fetched from the hub: {reason}{hint}") from error
