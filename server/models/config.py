"""Reading a checkpoint's config.json: typed values, and a refusal of everything that would change the network.

A key that we do not implement is never ignored: it must be absent, null or have the one value that means "off".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import ConfigurationError, quote


class ConfigReader:
    """A config.json under typed access. Every error names the key."""

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json") -> None:
        self._raw = raw
        self._source = source

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A required (without `default`) integer of at least `minimum`; null counts as absent."""
        value = self._raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigurationError(f"{self._source} lacks {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigurationError(
                f"{self._source}: {key} must be an integer of at least {minimum}, not {quote(value)}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self._raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigurationError(f"{self._source}: {key} must be a positive number, not {quote(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise ConfigurationError(f"{self._source}: {key} must be true or false, not {quote(value)}")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuse any value of `key` but null and the `allowed` ones (by value and type: 1 is not true)."""
        value = self._raw.get(key)
        if value is None or any(type(value) is type(option) and value == option for option in allowed):
            return
        expected = " or ".join(quote(option) for option in allowed) or "null"
        raise ConfigurationError(f"{self._source}: {key} = {quote(value)} is not supported; it must be {expected}")

    def require_all(self, key: str, allowed: str) -> None:
        """Refuse a list of `key` that holds anything but `allowed`."""
        value = self._raw.get(key)
        if value is not None and (not isinstance(value, list) or any(item != allowed for item in value)):
            raise ConfigurationError(f"{self._source}: {key} may only hold {quote(allowed)}, not {quote(value)}")

    def rope_theta(self, default: float) -> float:
        """The rotary base: `rope_theta`, or where newer files keep it: `rope_parameters`, of type `default` only."""
        parameters = self._raw.get("rope_parameters")
        if parameters is None:
            return self.number("rope_theta", default)
        if not isinstance(parameters, dict) or not set(parameters) <= {"rope_theta", "rope_type"}:
            raise ConfigurationError(f"{self._source}: rope_parameters = {quote(parameters)} is not supported")
        nested = ConfigReader(parameters, f"{self._source}: rope_parameters")
        nested.require("rope_type", "default")
        return nested.number("rope_theta", default)

    def divides(self, whole_key: str, whole: int, part_key: str, part: int) -> None:
        """Refuse a `whole` that is not a multiple of `part`."""
        if whole % part:
            raise ConfigurationError(f"{self._source}: {whole_key} = {whole} is not a multiple of {part_key} = {part}")
