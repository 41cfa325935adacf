"""The server on Ray Serve: `serve run deploy.ray.app:build`, or deploy/ray/serve.yaml.

One deployment `Ingress` without a model, which Serve's proxy asks, and one `Model`, of which each replica is the
application of `server.api.app` with an engine of its own. Settings are the server's, read once where this is built, and
may be given as arguments (`serve run deploy.ray.app:build max_queue=64`). What a deployment gets of the cluster (GPUs,
replicas, autoscaling) is Serve's configuration.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray import ingress
from deploy.ray.replica import respond
from deploy.ray.settings import divided, forget_keys, read, resources
from server.api.app import create_app
from server.api.telemetry import exporting_provider, send_last_spans
from server.cli import engine_config, prepare
from server.errors import EngineUnusable, Unavailable
from server.front.engine import Engine
from server.methods import load_plugins
from server.settings import Settings

logger = logging.getLogger(__name__)

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)
LIGHT = 64  # requests that compute nothing (models, token ids) are not counted by the ingress, but by Serve
ANSWERS_SECONDS = 5.0  # that replicas may take to tell their metrics
ANY_NUMBER = 1_000_000  # the ingress refuses by itself
HEALTH_SECONDS = 2.0  # between two checks
REPLACED_SECONDS = 30.0  # in which Serve replaces a replica whose engine is dead
LOOK_SECONDS = 0.5  # between two looks at which replicas run


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, by the settings of the environment, the YAML file and the arguments. Raises SettingsError."""
    door, model = divided(read(arguments))
    replicas = serve.deployment(
        Model,
        ray_actor_options=resources(model),
        max_ongoing_requests=model.max_queue + LIGHT,
        graceful_shutdown_timeout_s=model.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
    )
    before = serve.deployment(
        serve.ingress()(Ingress),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=ANY_NUMBER,
        graceful_shutdown_timeout_s=ingress.ATTEMPTS * door.drain_seconds,  # what replicas do not finish begins anew
        health_check_period_s=HEALTH_SECONDS,
    )
    return before.bind(replicas.bind(model), door)


class Model:
    """The application and its engine in a replica's process. It is there when the engine is ready, and unhealthy when
    the engine will not be ready again."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        forget_keys()
        prepare(settings)
        load_plugins(settings.plugins)
        self._name = serve.get_replica_context().replica_tag
        self._tracer_provider = exporting_provider(settings.otlp_endpoint)
        self._engine = Engine(engine_config(settings))
        self._app = create_app(self._engine, settings, tracer_provider=self._tracer_provider)
        self._frontend = self._app.state.frontend
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        while not self._engine.ready:
            await self.check_health()
            await asyncio.sleep(0.1)

    async def check_health(self) -> None:
        """Raises EngineUnusable when only another process can help."""
        if self._frontend.failure is not None or self._engine.given_up:
            raise EngineUnusable(f"the engine cannot go on: {self._frontend.failure or 'its workers die at once'}")

    async def respond(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """This replica's name, and ASGI's messages. One whose engine is dead keeps what it is asked until Serve ends
        it, when another is asked: refusing at once it would be the idlest of all, and chosen first."""
        left = REPLACED_SECONDS
        while self._engine.given_up and left > 0:
            await asyncio.sleep(LOOK_SECONDS)
            left -= LOOK_SECONDS
        yield {"type": "replica", "name": self._name}
        async with aclosing(respond(self._app, scope, body)) as messages:
            async for message in messages:
                yield message

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Its name and its metrics."""
        return self._name, list(self._frontend.metrics.registry.collect())

    async def __del__(self) -> None:
        """Serve calls it when nothing is in flight any more."""
        await self._lifespan.__aexit__(None, None, None)
        if self._tracer_provider is not None:
            send_last_spans(self._tracer_provider)


class Replicas(ingress.Fleet):
    """The replicas of a deployment of this application."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.running = 0
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._looking = asyncio.create_task(self._look(), name="which replicas run")

    async def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """As `Fleet` says."""
        messages = self._streams.respond.remote(scope, body)
        try:
            async for message in messages:
                yield message
        except LOST as error:
            raise ingress.ReplicaLost(error) from error
        except DeploymentUnavailableError:
            raise Unavailable("the replicas cannot be started") from None
        finally:
            messages.cancel()

    async def metrics(self) -> Mapping[str, Iterable[Metric]]:
        """As `Fleet` says, without those that have just died. Raises Unavailable when one does not answer in time."""
        asked = self._handle.broadcast("metrics")
        try:
            told = await asked.results_async(timeout_s=ANSWERS_SECONDS, return_exceptions=True)
        except TimeoutError:
            raise Unavailable(f"a replica did not tell its metrics within {ANSWERS_SECONDS:g} seconds") from None
        except DeploymentUnavailableError:  # there is none
            return {}
        return dict(each for each in told if not isinstance(each, Exception))

    async def _look(self) -> None:
        """Keep `running` up to date."""
        app, deployment = self._handle.app_name, self._handle.deployment_name
        while True:
            try:
                status = await asyncio.to_thread(serve.status)
                self.running = status.applications[app].deployments[deployment].replica_states.get("RUNNING", 0)
            except Exception as error:  # whatever it is, the next look may be right
                logger.warning("Serve does not say which replicas run: %r", error)
            await asyncio.sleep(LOOK_SECONDS)


class Ingress:
    """`ingress.Ingress` before the replicas, with the proxy's own copy of the header X-Request-Id taken off."""

    async def __init__(self, model: DeploymentHandle, settings: Settings) -> None:  # type: ignore[misc]  # as above
        forget_keys()
        prepare(settings)
        load_plugins(settings.plugins)
        if not settings.api_key:
            logger.warning("THERE IS NO API KEY: anyone who can reach Serve's proxy can use the server")
        self._app = ingress.Ingress(Replicas(model), settings).app

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def without_id(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [each for each in message["headers"] if each[0] != b"x-request-id"]
                await send(message)

            await self._app(scope, receive, sent)

        return without_id
