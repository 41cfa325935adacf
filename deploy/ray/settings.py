"""Which of the server's settings go where when it runs on Ray Serve."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.settings import ENV_PREFIX, HASHED, SETTINGS, Settings, SettingsError, load

PROXY = "connections are the business of Serve's proxy (http_options in its configuration)"
ELSEWHERE = {
    **dict.fromkeys(("host", "port", "ssl_certfile", "ssl_keyfile"), PROXY),
    **dict.fromkeys(("max_connections", "slow_client_seconds", "idle_connection_seconds"), PROXY),
    "allow_runtime_lora": "replicas would differ; name the adapters in `lora`",
    "batch_dir": "a folder of batches belongs to one server; `python -m clients batch` needs none",
}
"""Settings that would have no effect, and why."""
SEED_BYTES = 32
"""At most so many does the ingress add to a body."""


def read(arguments: Mapping[str, Any]) -> Settings:
    """The server's settings with the application's arguments, which win. Raises SettingsError, also for a plain API key
    among the arguments, since Serve keeps and shows them."""
    settings = load(arguments)
    if "api_key" in arguments and not all(key.startswith(HASHED) for key in settings.api_key):
        raise SettingsError("api_key: Serve shows its `args`; keys there must be sha256:HEX")
    return settings


def divided(settings: Settings) -> tuple[Settings, Settings]:
    """What the ingress gets, and what replicas get. Keys leave this process only as their hashes, and nothing that the
    ingress does is done twice; a replica has one thread unless more are asked for, and room for the seed in a body.
    Raises SettingsError for a setting that would have no effect."""
    for name, why in ELSEWHERE.items():
        if getattr(settings, name) != SETTINGS[name].default:
            raise SettingsError(f"{name}: has no effect on Ray Serve: {why}")
    door = replace(settings, api_key=tuple(map(_hashed, settings.api_key)))
    model = replace(settings, api_key=(), max_key_requests=None, max_key_trajectories=None, cors_origins=())
    return door, replace(model, threads=settings.threads or 1, max_body_bytes=settings.max_body_bytes + SEED_BYTES)


def resources(model: Settings) -> dict[str, float]:
    """Cores and GPUs of a replica. Ray numbers a replica's GPUs from 0, so they must reach to the highest number that
    its last worker takes."""
    devices = (model.device, model.reward_device or model.device)
    first = [int(each.partition(":")[2] or 0) for each in devices if each != "cpu"]
    return {
        "num_cpus": model.threads * model.data_parallel,
        "num_gpus": max(first) + model.data_parallel if first else 0,
    }


def forget_keys() -> None:
    """Take the API keys out of this process's environment, which plugins and scorers in Python can read."""
    for name in [name for name in os.environ if name.upper() == f"{ENV_PREFIX}API_KEY"]:
        del os.environ[name]


def _hashed(key: str) -> str:
    return key if key.startswith(HASHED) else HASHED + hashlib.sha256(key.encode()).hexdigest()
