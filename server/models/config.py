"""Reading a checkpoint's config.json: typed values, and a refusal of everything that would change the network.

A key that we do not implement is never ignored: it must be absent, null or have the one value that means "off".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from server.errors import ConfigurationError, quote

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What `rope_type: llama3` is made of, see `layers.RopeScaling`."""


class ConfigReader:
    """A JSON object under typed access; null counts as absent. Every error names the file and the key.

    `names` holds the keys that this file calls otherwise than those who ask.
    """

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json", names: Mapping[str, str] | None = None):
        self._raw, self._source, self._names = raw, source, names or {}

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`; without `default` it must be there."""
        value = self._value(key, default)
        if value is None:
            raise ConfigurationError(f"{self._source} lacks {self.name(key)}")
        if type(value) is not int or value < minimum:
            self._refuse(key, f"must be an integer of at least {minimum}, not {quote(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._refuse(key, f"must be a positive number, not {quote(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self._refuse(key, f"must be true or false, not {quote(value)}")
        return value

    def multiple(self, key: str, value: int, of: str, part: int) -> None:
        """Refuse a `value` of `key` that is no multiple of `part`, which is called `of`."""
        if value % part:
            self._refuse(key, f"= {value} is not a multiple of {of} = {part}")

    def require(self, key: str, *allowed: object) -> None:
        """Refuse any value of `key` but null and the `allowed` ones (by value and type: 1 is not true)."""
        value = self._value(key, None)
        if value is not None and not any(type(value) is type(option) and value == option for option in allowed):
            expected = " or ".join(quote(option) for option in allowed) or "null"
            self._refuse(key, f"= {quote(value)} is not supported; it must be {expected}")

    def rope(self, default: float) -> tuple[float, tuple[float, ...] | None]:
        """The rotary base, and the numbers of `LLAMA3` where the rotations are scaled in that way; any other scaling is
        refused. Newer files keep both in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`."""
        key = "rope_scaling"
        if self._value("rope_parameters", None) is not None:
            self.require(key)
            key = "rope_parameters"
        found = self._value(key, {})
        kind = found.get("rope_type", found.get("type", "default")) if isinstance(found, dict) else None
        names = LLAMA3 if kind == "llama3" else ()
        if kind not in ("default", "llama3") or not set(found) <= {"rope_type", "type", "rope_theta", *names}:
            self._refuse(key, f"= {quote(found)} is not supported; its rope_type must be default or llama3")
        nested = ConfigReader(found, f"{self._source}: {key}")
        theta = nested.number("rope_theta", self.number("rope_theta", default))
        if not names:
            return theta, None
        factor, low, high, length = (nested.number(name) for name in names)
        if low >= high:
            self._refuse(key, f"= {quote(found)}: low_freq_factor must be less than high_freq_factor")
        return theta, (factor, low, high, length)

    def name(self, key: str) -> str:
        """What this file calls a key."""
        return self._names.get(key, key)

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(self.name(key))
        return default if value is None else value

    def _refuse(self, key: str, words: str) -> NoReturn:
        raise ConfigurationError(f"{self._source}: {self.name(key)} {words}")
