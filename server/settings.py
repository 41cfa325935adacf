"""All settings of the server, read once at start-up: flags > environment (`ENTRGI_*`) > YAML file > defaults.

The same key has one spelling in all three places: `--max-queue`, `ENTRGI_MAX_QUEUE` and `max_queue:`. Lists are
repeated flags, comma-separated or JSON environment values, and YAML lists. A bad value is refused with its key.
Only the composition root (`server.cli`, a deployment) reads this; inner modules get the plain objects they need.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "ENTRGI_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
HASHED = "sha256:"
"""An API key may be given as this and the hexadecimal SHA-256 of the key, so that no configuration holds the key."""
KERNEL_CACHE_VARIABLE = "ENTRGI_CACHE_DIR"  # read by kernels, which knows nothing of these settings
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?|mps|xpu(:\d{1,3})?")


class SettingsError(ValueError):
    """A setting is wrong; the message names its key."""


class Settings(BaseSettings):
    """One attribute a setting. Sizes, times and counts carry their units in the description."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=False, protected_namespaces=()
    )

    # Models
    model: str | None = Field(None, description="diffusion model: local folder or hub id; none: the bundled one")
    revision: str | None = Field(None, description="git revision of a hub model, best a full commit hash")
    reward_model: Annotated[list[str], NoDecode] = Field(
        [], description="reward model as NAME=PATH_OR_ID or PATH_OR_ID; repeatable, the first is the default"
    )
    served_model_name: Annotated[list[str], NoDecode] = Field(
        [],
        description="the id that clients use, then other names for it; repeatable; default: folder or hub name",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = Field(
        "auto", description="weights' type; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    reward_device: str | None = Field(
        None, description="device of the reward models, as cuda:1 or cpu; none: that of the diffusion model"
    )
    attention_backend: Literal["auto", "varlen", "flash", "cpp", "sdpa"] = Field(
        "auto", description="attention over packed sequences: torch's varlen kernel, flash-attn's, or one a length"
    )
    compile: bool = Field(False, description="torch.compile of the diffusion model's blocks; a minute or more at start")
    cuda_graphs: bool = Field(False, description="CUDA graphs of the diffusion model's blocks, for small batches")
    reward_cuda_graphs: bool = Field(
        False, description="CUDA graphs of the reward models' passes, forward and back, for small batches"
    )
    max_model_len: int | None = Field(None, ge=1, description="lower the context length to this many tokens")
    vocab_fallback: Literal["unk", "zero"] = Field(
        "unk", description="reward embedding of a token that the reward vocabulary lacks"
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of each worker; 0: all cores but one, shared by the workers"
    )
    data_parallel: int = Field(
        1, ge=1, le=64, description="worker processes: with `device` cuda one a GPU, from the named one on"
    )

    # Network
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    root_path: str = Field("", description="prefix under which a proxy publishes the server")
    cors_origins: Annotated[list[str], NoDecode] = Field([], description="origins allowed by CORS; repeatable")
    ssl_certfile: Path | None = Field(None, description="TLS certificate (PEM)")
    ssl_keyfile: Path | None = Field(None, description="TLS private key (PEM)")
    ssl_keyfile_password: SecretStr | None = Field(None, description="password of an encrypted TLS private key")

    # Access
    api_key: Annotated[list[SecretStr], NoDecode] = Field(
        [], description="accepted API keys, or sha256:HEX of one; repeatable; none: no authentication"
    )
    api_key_file: Path | None = Field(
        None, description="file of further API keys, one a line (blank lines and those from # on are skipped)"
    )
    public_metrics: bool = Field(False, description="serve /metrics without an API key")
    public_playground: bool = Field(False, description="serve the page at / without an API key")

    # Limits
    max_queue: int = Field(256, ge=1, le=100_000, description="prompts in flight, waiting ones included")
    max_prompts: int = Field(128, ge=1, le=1024, description="prompts a request")
    max_trajectories: int = Field(128, ge=1, le=1024, description="best_of x prompts a request")
    max_score_pairs: int = Field(1024, ge=1, le=65536, description="pairs in a score or rerank request")
    max_connections: int = Field(
        2048, ge=1, le=1_000_000, description="open connections; past them only probes are answered, others get a 503"
    )
    max_body_bytes: int = Field(2_000_000, ge=1024, le=50_000_000, description="request body, bytes")
    max_header_bytes: int = Field(65_536, ge=4096, le=1_048_576, description="request header, bytes")
    receive_seconds: float = Field(
        30.0, gt=0, le=3600, description="for a request's header to arrive, and again for its body"
    )
    request_timeout: float | None = Field(
        None, gt=0, le=86_400, description="deadline of a request that names none, seconds"
    )

    # Batching
    batch_tokens: int = Field(
        0, ge=0, description="canvas tokens in one denoising step; 0: computed from the free memory"
    )
    batch_guided_rows: int = Field(
        0, ge=0, description="rows of logits that are guided at once; 0: computed from the free memory"
    )
    batch_reward_tokens: int = Field(
        0, ge=0, description="reward-model tokens that are guided at once; 0: computed from the free memory"
    )
    batch_trajectories: int = Field(256, ge=1, description="trajectories in one denoising step")
    memory_fraction: float = Field(
        0.8, gt=0, le=1, description="share of the memory that is free after loading that batches may take"
    )

    # Operation
    drain_seconds: float = Field(30.0, ge=0, le=86_400, description="grace for requests in flight at SIGTERM")
    keep_alive_seconds: float = Field(10.0, gt=0, le=3600, description="silence in a stream before a comment")
    stalled_client_seconds: float = Field(
        60.0, gt=0, le=3600, description="a stream whose client reads nothing for this long is closed"
    )
    watchdog_seconds: float = Field(120.0, gt=0, le=86_400, description="a step that hangs this long is killed")
    start_limit_seconds: float = Field(3600.0, gt=0, description="time to load and warm up")
    spare_worker: bool = Field(
        True, description="keep one more process at hand (about 300 MB), so that a restart skips the imports"
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level logged")
    otlp_endpoint: str | None = Field(
        None, description="collector for OpenTelemetry traces, as http://HOST:4318; none: OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    plugins: Annotated[list[str], NoDecode] = Field(
        [], description="Python module that the server imports and that may register guidance methods; repeatable"
    )
    disable_savings: Annotated[list[str], NoDecode] = Field(
        [], description="exact savings of the engine to do without, to measure or to debug; repeatable"
    )

    @field_validator(
        "reward_model", "cors_origins", "api_key", "served_model_name", "plugins", "disable_savings", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        """Environment lists: JSON, or comma-separated."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return _items(value)

    @field_validator("served_model_name", "plugins", "disable_savings", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        """Names hold no commas, so a flag may list several as well."""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [name for item in value for name in _items(item)]
        return value

    @field_validator("model", "revision", mode="after")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("served_model_name", mode="after")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        if not all(_NAME.fullmatch(name) for name in value):
            raise ValueError("must consist of letters, digits and . _ / -")
        return list(dict.fromkeys(value))

    @field_validator("device", "reward_device", mode="after")
    @classmethod
    def _known_device(cls, value: str | None) -> str | None:
        if value is not None and not _DEVICE.fullmatch(value):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("root_path", mode="after")
    @classmethod
    def _prefix(cls, value: str) -> str:
        value = value.rstrip("/")
        if value and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value):
            raise ValueError("must look like /some/prefix")
        return value

    @field_validator("api_key", mode="after")
    @classmethod
    def _strong_enough(cls, value: list[SecretStr]) -> list[SecretStr]:
        for key in value:
            _check_key(key.get_secret_value())
        return value

    @field_validator("reward_model", mode="after")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        reward_models(value)
        return value

    @field_validator("ssl_certfile", "ssl_keyfile", mode="after")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                value.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
        return value

    @field_validator("otlp_endpoint", mode="after")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
            raise ValueError("must look like http://HOST:4318")
        return value

    @model_validator(mode="after")
    def _tls_pair(self) -> Settings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together")
        if self.ssl_certfile is None or self.ssl_keyfile is None:
            return self
        given = self.ssl_keyfile_password
        password = given.get_secret_value() if given is not None else ""  # None would ask on the terminal
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password)
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or "is the password of the key right?"
            raise ValueError(f"ssl_certfile and ssl_keyfile cannot be used: {reason}") from None
        return self


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Read every source once. `flags` holds only what was given on the command line; `config` is the YAML file
    (else the one named by `ENTRGI_CONFIG`). Raises SettingsError."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = config or (Path(named) if named else None)
    file_values = _read_yaml(path) if path else {}

    class Layered(Settings):
        """Flags (as init values), then the environment, then the file. No .env is looked for."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=file_values)

    try:
        settings = Layered(**flags)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(each) for each in error.errors())) from None
    if settings.api_key_file is None:
        return settings
    return settings.model_copy(update={"api_key": settings.api_key + _keys_in(settings.api_key_file)})


def _keys_in(path: Path) -> list[SecretStr]:
    """The API keys in a file. Raises SettingsError when it cannot be read, holds none, or a bad one."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise SettingsError(f"api_key_file: {path} cannot be read: {reason}") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SettingsError(f"api_key_file: {path} holds no key; that would leave the server open")
    for key in found:
        try:
            _check_key(key)
        except ValueError as error:
            raise SettingsError(f"api_key_file: {error}") from None
    return [SecretStr(key) for key in found]


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _check_key(key: str) -> None:
    if key.startswith(HASHED):
        if not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED)):
            raise ValueError("sha256: must be followed by 64 lower-case hexadecimal digits")
    elif len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("a key needs at least 8 printable ASCII characters and no spaces")


def reward_models(values: list[str]) -> dict[str, str]:
    """`NAME=PATH_OR_ID` items as name -> path or id, in order. Raises ValueError for a bad or repeated name."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, source = value.partition("=")
        if not separator:
            source = value
            name = Path(value).name if Path(value).is_dir() else value
        if not _NAME.fullmatch(name) or not source:
            raise ValueError("must be NAME=PATH_OR_ID, the name of letters, digits and . _ / -")
        if name in named:
            raise ValueError(f"two reward models are named {name}; give them names, as in NAME=PATH_OR_ID")
        named[name] = source
    return named


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of `ENTRGI_*` variables that are no setting: most likely misspelt."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, KERNEL_CACHE_VARIABLE}
    return sorted(name for name in environment if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)


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


def _explain(error: Any) -> str:
    key = str(error["loc"][0]) if error["loc"] else "settings"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "is not a setting"
    if key in ("api_key", "ssl_keyfile_password"):  # never repeat a secret
        return f"{key}: {message}"
    shown = repr(error["input"])
    return f"{key}: {message} (got {shown[:200]})" if error["loc"] else message
