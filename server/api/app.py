"""The application factory: one engine, its settings, all routes. Tests drive it in-process, uvicorn by socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from opentelemetry.trace import NoOpTracerProvider, TracerProvider
from starlette.applications import Starlette

from server import __version__
from server.api import batches as batch_routes
from server.api import errors, files, loras, openapi, ops, rewards, routes, telemetry, web
from server.api.batch_runner import Batches
from server.api.frontend import Frontend
from server.api.metrics import Metrics
from server.api.middleware import Cors, Guard, Observe
from server.api.shares import Shares
from server.front.engine import Engine
from server.settings import Settings

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Reward-guided diffusion language models behind OpenAI's API, with `guidance` and `diffusion` objects. "
    "Integers are written without a fraction (2, not 2.0), and no key occurs twice in an object."
)


def create_app(
    engine: Engine,
    settings: Settings,
    *,
    tracer_provider: TracerProvider | None = None,
    on_failure: Callable[[], object] = lambda: None,
) -> FastAPI:
    """The application on an engine that has not been started: its lifespan starts and stops it. The socket is open
    while the models load; `on_failure` hears when they cannot be loaded. Spans go to `tracer_provider`."""
    metrics = Metrics(engine)
    tracer = (tracer_provider or NoOpTracerProvider()).get_tracer("entrgi", __version__)
    frontend = Frontend(engine, settings, metrics, tracer, Shares(settings, engine.ends_seconds))
    batches = None if settings.batch_dir is None else Batches(frontend, Path(settings.batch_dir))

    async def start() -> None:
        try:
            if batches is not None:
                batches.open()
            await engine.start()
            for name in (engine.info.model.id, *engine.adapters.names):
                metrics.introduce(name)
            frontend.check_names()
            await frontend.tokenizer()
            if batches is not None:
                batches.start()
        except Exception as error:
            frontend.failure = error
            logger.error("the engine could not be started: %s", error)
            on_failure()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(start(), name="engine-start")
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            if batches is not None:
                await batches.close()
            await engine.stop()
            frontend.close()

    app = FastAPI(
        title="EntRGi server",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # both pages would load scripts from elsewhere; ours is behind a setting
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry.fastapi_config(tracer_provider, settings.root_path),
    )
    app.state.frontend, app.state.batches = frontend, batches
    asked_for = [*([loras] if settings.allow_runtime_lora else ()), *([files, batch_routes] if batches else ())]
    for each in (routes, rewards, ops, web, *asked_for):
        app.include_router(each.router)
    if settings.api_docs:
        app.include_router(web.reference)
    errors.install(app)
    openapi.install(app, frontend)

    guard(app, settings, metrics)
    return app


def guard(app: Starlette, settings: Settings, metrics: Metrics) -> None:
    """Put what every request passes before the routes: ids, log and counts, CORS, keys and limits of size."""
    # Added last is outermost.
    app.add_middleware(Guard, settings=settings, page_files=web.playground_files())
    if settings.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", *(["DELETE"] if settings.batch_dir is not None else [])],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", "traceparent", "tracestate"],
            expose_headers=["X-Request-Id", "Retry-After", "x-should-retry"],
        )
    app.add_middleware(Observe, metrics=metrics, root_path=settings.root_path)
