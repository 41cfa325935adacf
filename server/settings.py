"""All settings of the server, read once at start-up: flags > environment (`ENTRGI_*`) > YAML file > defaults.

The same key has one spelling in all three places: `--max-queue`, `ENTRGI_MAX_QUEUE` and `max_queue:`. Lists are
repeated flags, comma-separated or JSON environment values, and YAML lists. Where its items are objects, a flag or an
environment value is JSON. A bad value is refused with its key.
Only the composition root (`server.cli`) and the HTTP application read this; the engine and its workers get the plain
objects of `server.wire.config`, whose settings `Settings` inherits.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from server.wire.config import NAME, FrontSettings, RewardSource, WorkerSettings, says

ENV_PREFIX = "ENTRGI_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
HASHED = "sha256:"
"""An API key may be given as this and the hexadecimal SHA-256 of the key, so that no configuration holds the key."""
KEY_FILE = "file:"
"""Or as this and the path of a file of keys, one a line; blank lines and those that begin with # are skipped."""
KERNEL_CACHE_VARIABLE = "ENTRGI_CACHE_DIR"  # read by kernels, which knows nothing of these settings


class SettingsError(ValueError):
    """A setting is wrong; the message names its key."""


@dataclass(frozen=True, kw_only=True)
class Settings(WorkerSettings, FrontSettings):
    """One attribute a setting. Sizes, times and counts carry their units in the name or the description."""

    # Models
    model: Annotated[
        Annotated[str, Meta(pattern=r"\S")] | None,
        says("diffusion model: local folder, hub id or ID@REVISION; none: the bundled one"),
    ] = None
    reward_model: Annotated[
        tuple[RewardSource, ...],
        says(
            "reward model as NAME=PATH_OR_ID, PATH_OR_ID, or an object of path and perhaps name, label, output, input; "
            "repeatable, the first is the default"
        ),
    ] = ()
    served_model_name: Annotated[
        tuple[Annotated[str, Meta(pattern=NAME)], ...],
        says("the id that clients use, then other names for it; repeatable; default: folder or hub name"),
    ] = ()

    lora: Annotated[
        tuple[str, ...], says("LoRA adapter of the diffusion model as NAME=PATH, a model of its own; repeatable")
    ] = ()
    allow_runtime_lora: Annotated[
        bool, says("clients may load and unload adapters, from below lora_dir; whoever can reach the server can")
    ] = False
    lora_dir: Annotated[str | None, says("folder below which adapters that clients load must be")] = None

    # Network
    host: Annotated[str, says("address to listen on")] = "127.0.0.1"
    port: Annotated[int, says("port to listen on; 0: any free one", ge=0, le=65535)] = 8000
    root_path: Annotated[
        str,
        says("prefix under which a proxy publishes the server, as /some/prefix", pattern=r"^((/[A-Za-z0-9._~-]+)+)?$"),
    ] = ""
    cors_origins: Annotated[tuple[str, ...], says("origins allowed by CORS; repeatable")] = ()
    ssl_certfile: Annotated[str | None, says("TLS certificate (PEM)")] = None
    ssl_keyfile: Annotated[str | None, says("TLS private key (PEM), not encrypted")] = None

    # Access
    api_key: Annotated[
        tuple[str, ...],
        says(
            "accepted API key, sha256:HEX of one, or file:PATH of a file of them; repeatable; none: everybody may come"
        ),
    ] = field(default=(), repr=False)
    public_paths: Annotated[
        tuple[Literal["/metrics", "/", "/docs"], ...],
        says("served without an API key: /metrics, / (the playground), /docs (if there); repeatable"),
    ] = ()
    api_docs: Annotated[bool, says("serve /docs, the OpenAPI document as a page that loads nothing else")] = False
    max_key_requests: Annotated[
        Annotated[int, Meta(ge=1)] | None, says("requests that one API key may have in flight; none: no limit")
    ] = None
    max_key_trajectories: Annotated[
        Annotated[int, Meta(ge=1)] | None, says("trajectories that one API key may have in flight; none: no limit")
    ] = None

    # Limits
    max_trajectories: Annotated[int, says("best_of x prompts of one request", ge=1, le=1024)] = 128
    max_score_pairs: Annotated[int, says("pairs in a score or rerank request", ge=1, le=65536)] = 1024
    max_connections: Annotated[
        int, says("open connections; past them only probes are answered, others get a 503", ge=1, le=1_000_000)
    ] = 2048
    max_body_bytes: Annotated[int, says("request body, bytes", ge=1024, le=50_000_000)] = 2_000_000
    request_timeout: Annotated[
        Annotated[float, Meta(gt=0, le=86_400)] | None, says("deadline of a request that names none, seconds")
    ] = None
    slow_client_seconds: Annotated[
        float, says("a client may take this long to send a header, a body, or to read any of its answer", gt=0, le=3600)
    ] = 30.0
    idle_connection_seconds: Annotated[
        int,
        says("a connection between two requests is kept this long; longer than proxies keep theirs", ge=1, le=86_400),
    ] = 75

    # Batches
    batch_dir: Annotated[
        str | None, says("folder of files and batches, this server's alone; none: no /v1/files, no /v1/batches")
    ] = None
    batch_file_bytes: Annotated[int, says("a file that is sent for a batch, bytes", ge=1024, le=10_000_000_000)] = (
        100_000_000
    )
    batch_expire_seconds: Annotated[
        int, says("files and batches are kept this long, seconds", ge=1, le=10 * 365 * 86_400)
    ] = 30 * 86_400

    # Operation
    drain_seconds: Annotated[float, says("grace for requests in flight at SIGTERM", ge=0, le=86_400)] = 30.0
    stream_comment_seconds: Annotated[
        float, says("silence in a stream before a comment that keeps it open", gt=0, le=3600)
    ] = 10.0
    otlp_endpoint: Annotated[
        Annotated[str, Meta(pattern=r"^https?://[^\s/]+(/\S*)?$")] | None,
        says("collector for OpenTelemetry traces, as http://HOST:4318; none: OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = None

    def of(self, part: type[WorkerSettings] | type[FrontSettings]) -> dict[str, Any]:
        """The settings that `part` declares, by name."""
        return {each.name: getattr(self, each.name) for each in fields(part)}


@dataclass(frozen=True, slots=True)
class Setting:
    """What flags, errors and documentation need to know of one setting."""

    kind: Any
    description: str
    default: object

    @property
    def is_list(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.kind) is tuple

    @property
    def holds_objects(self) -> bool:
        """Whether it is a list of objects."""
        of = get_args(self.kind)[0] if self.is_list else None
        return isinstance(of, type) and issubclass(of, msgspec.Struct)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where it takes only some."""
        of = get_args(self.kind)[0] if self.is_list else self.kind
        return get_args(of) if get_origin(of) is Literal else ()


def _table() -> dict[str, Setting]:
    found = {}
    for each in fields(Settings):
        kind = _KINDS[each.name]
        (description,) = (meta.description for meta in kind.__metadata__ if meta.description)
        found[each.name] = Setting(kind.__origin__, description, each.default)
    return found


_KINDS = get_type_hints(Settings, include_extras=True)
SETTINGS = _table()
"""Every setting by its key."""
_LISTED_IN_A_FLAG = frozenset({"served_model_name", "public_paths", "plugins"})  # what holds no commas


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Read every source once. `flags` holds only what was given on the command line; `config` is the YAML file
    (else the one named by `ENTRGI_CONFIG`). Raises SettingsError, which names every key that is wrong."""
    environment = {name.upper(): value for name, value in os.environ.items()}
    named = environment.get(CONFIG_VARIABLE)
    path = config or (Path(named) if named else None)
    given = _read_yaml(path) if path else {}
    given |= {key: environment[name] for key in SETTINGS if (name := ENV_PREFIX + key.upper()) in environment}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in {**given, **flags}.items():
        try:
            values[key] = _checked(key, value)
        except ValueError as error:
            shown = "" if key == "api_key" else f" (got {repr(value)[:200]})"  # never repeat a secret
            problems.append(f"{key}: {error}{shown}")
    if problems:
        raise SettingsError("; ".join(problems))
    settings = Settings(**values)
    _check_tls(settings.ssl_certfile, settings.ssl_keyfile)
    for key in ("max_key_requests", "max_key_trajectories"):
        if getattr(settings, key) is not None and not settings.api_key:
            raise SettingsError(f"{key}: has no effect without an api_key")
    _check_loras(settings)
    if settings.batch_dir is not None and not Path(settings.batch_dir).is_dir():
        raise SettingsError(f"batch_dir: there is no folder {settings.batch_dir}")
    return replace(settings, api_key=tuple(key for item in settings.api_key for key in _keys_of(item)))


def _checked(key: str, value: object) -> object:
    """A value from any source as the setting's type. Raises ValueError."""
    setting = SETTINGS.get(key)
    if setting is None:
        raise ValueError(f"is not a setting{meant(key, SETTINGS)}")
    if setting.is_list:
        value = _items(value, setting, key in _LISTED_IN_A_FLAG)
    if key == "reward_model" and isinstance(value, list):
        value = [_reward_source(item) for item in value]
    if key == "root_path" and isinstance(value, str):
        value = value.rstrip("/")
    try:
        made: Any = msgspec.convert(value, _KINDS[key], strict=False)
    except msgspec.ValidationError as error:
        expected = f"one of {', '.join(setting.choices)}" if setting.choices else setting.description
        raise ValueError(f"{error}; the setting is: {expected}") from None
    if key == "lora":
        named_models(made)
    if key in ("reward_model", "scorers"):
        _check_names(each.name for each in made)
    for each in made if key == "api_key" else ():
        _check_key(each)
    return made


def _items(value: object, setting: Setting, split_each: bool) -> object:
    """A list as a source gives it: JSON or comma-separated in one string, or items already, of which objects may be
    JSON."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return json.loads(value)
        objects = setting.holds_objects and value.lstrip().startswith("{")
        value = [value] if objects else [item.strip() for item in value.split(",") if item.strip()]
    if setting.holds_objects and isinstance(value, list):
        return [json.loads(item) if isinstance(item, str) and item.lstrip().startswith("{") else item for item in value]
    if split_each and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(dict.fromkeys(name.strip() for item in value for name in item.split(",") if name.strip()))
    return value


def _check_key(key: str) -> None:
    if key.startswith(HASHED):
        if not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED)):
            raise ValueError("sha256: must be followed by 64 lower-case hexadecimal digits")
    elif not key.startswith(KEY_FILE) and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise ValueError("a key needs at least 8 printable ASCII characters and no spaces")


def _keys_of(item: str) -> list[str]:
    """The keys of one item of `api_key`, which may name a file of them. Raises SettingsError when the file cannot be
    read, holds none, or a bad one."""
    if not item.startswith(KEY_FILE):
        return [item]
    path = item.removeprefix(KEY_FILE)
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="ascii").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        for key in keys:
            _check_key(key)
    except OSError as error:
        raise SettingsError(f"api_key: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"api_key: {path} cannot be read: it is not ASCII") from None
    except ValueError as error:
        raise SettingsError(f"api_key: {path}: {error}") from None
    if not keys:
        raise SettingsError(f"api_key: {path} holds no key; that would leave the server open")
    return keys


def _check_tls(certificate: str | None, key: str | None) -> None:
    """Refuse what cannot be served, before the models are loaded."""
    if (certificate is None) != (key is None):
        raise SettingsError("ssl_certfile and ssl_keyfile go together")
    if certificate is None:
        return
    try:  # an empty password: None would ask on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "is the key encrypted?"
        raise SettingsError(f"ssl_certfile and ssl_keyfile cannot be used: {reason}") from None


def _check_loras(settings: Settings) -> None:
    """Refuse settings about adapters that do not fit together."""
    if settings.allow_runtime_lora != (settings.lora_dir is not None):
        raise SettingsError("allow_runtime_lora and lora_dir go together")
    if settings.lora_dir is not None and not Path(settings.lora_dir).is_dir():
        raise SettingsError(f"lora_dir: there is no folder {settings.lora_dir}")
    if len(settings.lora) > settings.max_loras:
        raise SettingsError(f"lora: {len(settings.lora)} adapters are more than max_loras = {settings.max_loras}")


def named_models(values: Iterable[str]) -> dict[str, str]:
    """`NAME=PATH_OR_ID` items as name -> path or id, in order. Raises ValueError for a bad or repeated name."""
    pairs = [_name_and_source(value) for value in values]
    _check_names(name for name, _ in pairs)
    return dict(pairs)


def _name_and_source(value: str) -> tuple[str, str]:
    name, separator, source = value.partition("=")
    if not separator:
        name, source = _own_name(value), value
    if not re.fullmatch(NAME, name) or not source:
        raise ValueError("must be NAME=PATH_OR_ID, the name of letters, digits and . _ / -")
    return name, source


def _own_name(source: str) -> str:
    """What a model is called that is given no name."""
    return Path(source).name if Path(source).is_dir() else source


def _reward_source(item: object) -> object:
    """An item of `reward_model` as an object with a name, as far as it can be one."""
    if isinstance(item, str):
        name, path = _name_and_source(item)
        return {"name": name, "path": path}
    if isinstance(item, dict) and isinstance(item.get("path"), str):
        return {"name": _own_name(item["path"])} | item
    return item


def _check_names(names: Iterable[str]) -> None:
    """Refuse a name that is there twice. Raises ValueError."""
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ValueError(f"two of them are named {name}; give them names, as in NAME=PATH_OR_ID")
        seen.add(name)


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """`ENTRGI_*` variables that are no setting, most likely misspelt, each with what was probably meant."""
    known = {ENV_PREFIX + name.upper() for name in SETTINGS} | {CONFIG_VARIABLE, KERNEL_CACHE_VARIABLE}
    unknown = (name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
    return {name: meant(name.upper(), known) for name in sorted(unknown)}


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says that there is no `name`: the nearest of those that there are."""
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"config: {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"config: {path} must hold `key: value` lines")
    return {key.replace("-", "_"): value for key, value in values.items()}
