"""Reading a checkpoint's config.json: typed values, and a refusal of everything that would change the network.

A key that we do not implement is never ignored: it must be absent, null or have the one value that means "off".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from server.errors import ConfigurationError, quote


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

    def number(self, key: str, default: float) -> float:
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

    def rope_theta(self, default: float) -> float:
        """The rotary base: `rope_theta`, or where newer files keep it: `rope_parameters`, of type `default` only."""
        parameters = self._raw.get("rope_parameters")
        if parameters is None:
            return self.number("rope_theta", default)
        if not isinstance(parameters, dict) or not set(parameters) <= {"rope_theta", "rope_type"}:
            self._refuse("rope_parameters", f"= {quote(parameters)} is not supported")
        nested = ConfigReader(parameters, f"{self._source}: rope_parameters")
        nested.require("rope_type", "default")
        return nested.number("rope_theta", default)

    def name(self, key: str) -> str:
        """What this file calls a key."""
        return self._names.get(key, key)

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(self.name(key))
        return default if value is None else value

    def _refuse(self, key: str, words: str) -> NoReturn:
        raise ConfigurationError(f"{self._source}: {self.name(key)} {words}")
