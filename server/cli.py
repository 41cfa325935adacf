"""The composition root: settings in, one engine and one HTTP server out, and an orderly end.

The socket is bound before the models load, so that probes get answers; `/ready` turns 200 only after a guided warm-up.
SIGTERM or SIGINT begins a drain: `/ready` is 503 at once, requests in flight finish within the grace time, then the
process ends. A second signal ends it now.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args, get_origin

import uvicorn
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from server import __version__, log
from server.api.app import create_app
from server.api.middleware import QUIET_PATHS
from server.api.protocol import EXTRA_CONNECTIONS, Room, connection_class
from server.api.telemetry import exporting_provider, send_last_spans
from server.errors import ConfigurationError
from server.front.engine import Engine
from server.methods import load_plugins
from server.settings import ENV_PREFIX, Settings, SettingsError, load, reward_models, unknown_variables
from server.wire.config import BudgetSettings, EngineConfig, WorkerConfig
from server.worker.savings import Savings

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# After the drain only answers that are being written are left.
LAST_WRITES_SECONDS = 5
OTHER_DESCRIPTORS = 128  # than those of clients: workers, files, libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop. Returns the exit status: 0 after a drain, 1 when it could not start, 2
    for wrong settings."""
    parsed = vars(parser().parse_args(arguments))
    parsed.pop("command")
    config: Path | None = parsed.pop("config", None)
    try:
        settings = load(parsed, config)
        load_plugins(settings.plugins)
        Savings.without(settings.disable_savings)  # a misspelt name is found now, not when the models are loaded
        tracer_provider = exporting_provider(settings.otlp_endpoint)
    except (SettingsError, ConfigurationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.configure(settings.log_level, settings.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one by one; no thread a core for them
    for name in unknown_variables(os.environ):
        logger.warning("%s is set but is no setting of this server", name)
    if settings.host not in LOOPBACK and not settings.api_key:
        logger.warning("LISTENING ON %s WITHOUT AN API KEY: anyone who can reach it can use it", settings.host)
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        status = runner.run(serve(settings, tracer_provider))
    if tracer_provider is not None:
        send_last_spans(tracer_provider)
    return status


async def serve(settings: Settings, tracer_provider: TracerProvider | None = None) -> int:
    """Serve until a signal, or until the engine turns out not to start. Returns the exit status."""
    engine = Engine(engine_config(settings))
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(engine, settings, tracer_provider=tracer_provider, on_failure=failed)
    server = Server(http_config(app, settings))
    allow_descriptors(settings.max_connections + EXTRA_CONNECTIONS + OTHER_DESCRIPTORS)
    sock = server.config.bind_socket()
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        logger.info("draining: requests in flight have %g seconds", settings.drain_seconds)
        await engine.drain(settings.drain_seconds)
        server.should_exit = True

    def on_signal() -> None:
        if draining:
            server.should_exit = server.force_exit = True
        else:
            draining.append(asyncio.create_task(drain(), name="drain"))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in draining:
            task.cancel()
        sock.close()
    return 1 if failures else 0


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end it before the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def allow_descriptors(needed: int) -> None:
    """Raise this process's soft limit on descriptors to what is needed; warn where the hard limit forbids it. Without
    a free descriptor no connection is accepted, a probe's neither."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning("max_connections needs %d descriptors and the system allows %d (ulimit -Hn)", needed, allowed)


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration. h11, under our connection, bounds the size of headers while they arrive."""
    probes = frozenset(prefix + path for prefix in {"", settings.root_path} for path in QUIET_PATHS)
    room = Room(settings.max_connections, probes, app.state.frontend.refused)
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connection_class(settings.receive_seconds, settings.stalled_client_seconds, room),
        h11_max_incomplete_event_size=settings.max_header_bytes + 1024,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=None
        if settings.ssl_keyfile_password is None
        else settings.ssl_keyfile_password.get_secret_value(),
        timeout_graceful_shutdown=LAST_WRITES_SECONDS,
        backlog=2048,
    )


def engine_config(settings: Settings) -> EngineConfig:
    """The engine's plain values. Without a model the bundled one is served, and without any model named at all the
    bundled reward models too."""
    model, rewards = settings.model, reward_models(settings.reward_model)
    name = settings.served_model_name[0] if settings.served_model_name else None
    if model is None:
        from demo import BUNDLED_NAME, bundled_model_path, bundled_reward_models

        model, name = str(bundled_model_path()), name or BUNDLED_NAME
        if not rewards:
            rewards = {name: str(path) for name, path in bundled_reward_models().items()}
    return EngineConfig(
        worker=WorkerConfig(
            model=model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=settings.device,
            reward_device=settings.reward_device,
            attention_backend=settings.attention_backend,
            compile=settings.compile,
            cuda_graphs=settings.cuda_graphs,
            reward_cuda_graphs=settings.reward_cuda_graphs,
            reward_models=rewards,
            vocab_fallback=settings.vocab_fallback,
            max_model_len=settings.max_model_len,
            served_model_name=name,
            threads=settings.threads,
            data_parallel=settings.data_parallel,
            budget=BudgetSettings(
                tokens=settings.batch_tokens,
                guided_rows=settings.batch_guided_rows,
                reward_tokens=settings.batch_reward_tokens,
                trajectories=settings.batch_trajectories,
                memory_fraction=settings.memory_fraction,
            ),
            plugins=tuple(settings.plugins),
            disable_savings=tuple(settings.disable_savings),
            log_level=settings.log_level,
            log_format=settings.log_format,
        ),
        max_jobs=settings.max_queue,
        watchdog_seconds=settings.watchdog_seconds,
        start_limit_seconds=settings.start_limit_seconds,
        spare_worker=settings.spare_worker,
    )


def parser() -> argparse.ArgumentParser:
    """Flags for every setting. What is not given stays absent, so that the environment and the file are heard."""
    made = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a reward-guided diffusion language model behind OpenAI's API. Every setting is also an "
        f"environment variable ({ENV_PREFIX}PORT for --port) and a key of the YAML file; flags win over the "
        "environment, the environment over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    made.add_argument("command", nargs="?", choices=("serve",), default="serve", help="serve (may be left out)")
    made.add_argument("--version", action="version", version=__version__)
    made.add_argument("--config", type=Path, metavar="FILE", help=f"YAML file of settings ({ENV_PREFIX}CONFIG)")
    for name, field in Settings.model_fields.items():
        _add_flag(made, name, field)
    return made


def _add_flag(made: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    text = f"{field.description} (default: {_shown(field)})".replace("%", "%%")
    kind = field.annotation
    if kind is bool:
        made.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(kind) is list:
        made.add_argument(flag, dest=name, action="append", metavar="VALUE", help=text)
    else:
        choices = [value for value in get_args(kind) if isinstance(value, str)]
        made.add_argument(flag, dest=name, metavar="|".join(choices) or "VALUE", help=text)


def _shown(field: FieldInfo) -> str:
    default = field.default
    return "none" if default is None or default in ([], "", PydanticUndefined) else str(default)
