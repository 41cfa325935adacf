"""Which of the server's settings go where when it runs on Ray Serve."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from server.settings import HASHED, SETTINGS, Settings, SettingsError

PROXY = "connections are the business of Serve's proxy (http_options in its configuration)"
ELSEWHERE = {
    **dict.fromkeys(("host", "port", "ssl_certfile", "ssl_keyfile"), PROXY),
    **dict.fromkeys(("max_connections", "slow_client_seconds", "idle_connection_seconds"), PROXY),
    "allow_runtime_lora": "replicas would differ; name the adapters in `lora`",
    "batch_dir": "a folder of batches belongs to one server; `python -m clients batch` needs none",
}
"""Settings that would have no effect, and why."""


def divided(settings: Settings) -> tuple[Settings, Settings]:
    """What the ingress gets, and what replicas get. Keys leave this process only as their hashes, and nothing that the
    ingress does is done twice; a replica has one thread unless more are asked for. Raises SettingsError for a setting
    that would have no effect."""
    for name, why in ELSEWHERE.items():
        if getattr(settings, name) != SETTINGS[name].default:
            raise SettingsError(f"{name}: has no effect on Ray Serve: {why}")
    door = replace(settings, api_key=tuple(map(_hashed, settings.api_key)))
    model = replace(settings, api_key=(), max_key_requests=None, max_key_trajectories=None, cors_origins=())
    return door, replace(model, threads=settings.threads or 1)


def _hashed(key: str) -> str:
    return key if key.startswith(HASHED) else HASHED + hashlib.sha256(key.encode()).hexdigest()
