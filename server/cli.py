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

import uvicorn
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider

from server import __version__, log
from server.api.app import create_app
from server.api.middleware import MAX_HEADER_BYTES, probe_paths
from server.api.protocol import EXTRA_CONNECTIONS, Connection, Room
from server.api.telemetry import exporting_provider, send_last_spans
from server.errors import ConfigurationError
from server.front.engine import Engine
from server.methods import load_plugins
from server.settings import (
    ENV_PREFIX,
    SETTINGS,
    Settings,
    SettingsError,
    load,
    meant,
    named_models,
    unknown_variables,
)
from server.wire.config import EngineConfig, FrontSettings, RewardSource, WorkerConfig, WorkerSettings

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LAST_WRITES_SECONDS = 5  # after the drain, for answers that are still being written to their clients
OTHER_DESCRIPTORS = 128  # which workers, files and libraries need beside those of clients


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop. Returns the exit status: 0 after a drain, 1 when it could not start, 2
    for wrong settings."""
    parsed = vars(_parse(sys.argv[1:] if arguments is None else arguments))
    command = parsed.pop("command")
    config: Path | None = parsed.pop("config", None)
    try:
        settings = load(parsed, config)
        load_plugins(settings.plugins)
        tracer_provider = exporting_provider(settings.otlp_endpoint)
    except (SettingsError, ConfigurationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if command == "doctor":
        from server import doctor  # which imports torch

        return doctor.main(engine_config(settings).worker)
    prepare(settings)
    if settings.host not in LOOPBACK and not settings.api_key:
        logger.warning("LISTENING ON %s WITHOUT AN API KEY: anyone who can reach it can use it", settings.host)
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        status = runner.run(serve(settings, tracer_provider))
    if tracer_provider is not None:
        send_last_spans(tracer_provider)
    return status


def prepare(settings: Settings) -> None:
    """What a process that serves does first: logs, and warnings of settings that are none."""
    log.configure(settings.log_level, settings.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one by one; no thread a core for them
    for name, hint in unknown_variables(os.environ).items():
        logger.warning("%s is set but is no setting of this server%s", name, hint)


async def serve(settings: Settings, tracer_provider: TracerProvider | None = None) -> int:
    """Serve until a signal, or until the engine turns out not to start. Returns the exit status."""
    engine = Engine(engine_config(settings))

    def give_up() -> None:
        server.should_exit = True

    app = create_app(engine, settings, tracer_provider=tracer_provider, on_failure=give_up)
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
    return 1 if app.state.frontend.failure else 0


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
    refused = app.state.frontend.metrics.refused
    room = Room(settings.max_connections, settings.slow_client_seconds, probe_paths(settings.root_path), refused)
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=type("Connection", (Connection,), {"room": room}),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES + 1024,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        timeout_keep_alive=settings.idle_connection_seconds,
        timeout_graceful_shutdown=LAST_WRITES_SECONDS,
        backlog=2048,
    )


def engine_config(settings: Settings) -> EngineConfig:
    """The engine's plain values. Without a model the bundled one is served, and without any model named at all the
    bundled reward models too."""
    model, rewards = settings.model, settings.reward_model
    name = settings.served_model_name[0] if settings.served_model_name else None
    if model is None:
        from demo import BUNDLED_NAME, bundled_model_path, bundled_reward_models

        model, name = str(bundled_model_path()), name or BUNDLED_NAME
        if not rewards:
            rewards = tuple(RewardSource(name, str(path)) for name, path in bundled_reward_models().items())
    # A new version of an adapter is loaded while the old one is there.
    places = settings.max_loras + 1 if settings.allow_runtime_lora else len(settings.lora)
    worker = WorkerConfig(model, rewards, name, adapters=places, **settings.of(WorkerSettings))
    return EngineConfig(worker, named_models(settings.lora), **settings.of(FrontSettings))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the arguments say. A misspelt flag ends the program with the nearest one."""
    made = parser()
    known = made._option_string_actions
    for flag in (word.partition("=")[0] for word in arguments):
        if flag.startswith("--") and flag not in known:
            made.error(f"there is no {flag}{meant(flag, known)}")
    return made.parse_args(arguments)


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
    text = "serve (may be left out), or doctor: say what of this machine is in the way of serving so"
    made.add_argument("command", nargs="?", choices=("serve", "doctor"), default="serve", help=text)
    made.add_argument("--version", action="version", version=__version__)
    made.add_argument("--config", type=Path, metavar="FILE", help=f"YAML file of settings ({ENV_PREFIX}CONFIG)")
    for name, setting in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        default = "none" if setting.default in (None, (), "") else setting.default
        text = f"{setting.description} (default: {default})".replace("%", "%%")
        if setting.kind is bool:
            made.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            action = "append" if setting.is_list else "store"
            made.add_argument(flag, dest=name, action=action, metavar="|".join(setting.choices) or "VALUE", help=text)
    return made
