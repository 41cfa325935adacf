"""What the routes share: the engine, the settings, the tokenizer and the metrics of one application."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from opentelemetry.trace import Tracer

from server.api.metrics import Metrics
from server.api.rules import Served
from server.api.shares import Shares
from server.errors import ConfigurationError, InvalidRequest, NotReady, QueueFull
from server.front.engine import Engine, JobStream
from server.log import request_id
from server.scorers.calls import Metadata
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from server.types import Job

Result = TypeVar("Result")


@dataclass(slots=True)
class Frontend:
    """One an application, in `app.state.frontend`; what answers batches has another, of a higher `priority`, which the
    engine's work for it has: lower ones go first."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    tracer: Tracer
    shares: Shares
    priority: int = 0
    created: int = field(default_factory=lambda: int(time.time()))  # of the models, to their readers
    failure: BaseException | None = None  # why the engine could not start
    _tokenizer: Tokenizer | None = None
    _waiting: int = 0  # calls of `aside`
    # Long prompts would hold up the event loop for as long as they take to tokenise.
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    @property
    def served(self) -> Served | None:
        """What this server takes, as far as it is known: nothing before the models are loaded."""
        try:
            return Served.of(self.engine.info, self.settings, self.engine.adapters.names)
        except NotReady:
            return None

    def check_names(self) -> None:
        """Raises ConfigurationError where two models, or a model and a scorer, have one name."""
        info, adapters, scorers = self.engine.info, self.engine.adapters.names, self.engine.scorers
        models = Served.of(info, self.settings, adapters).models
        for name, count in Counter((*models, *(reward.id for reward in info.reward_models), *scorers)).items():
            for setting, names in (("lora", adapters), ("scorers", scorers)):
                if count > 1 and name in names:
                    raise ConfigurationError(f"{setting}: another model is named {name}")

    async def tokenizer(self) -> Tokenizer:
        """The diffusion model's tokenizer, loaded at first use. Raises NotReady."""
        if self._tokenizer is None:
            path = self.engine.info.model.tokenizer_path
            self._tokenizer = await self.aside(lambda: Tokenizer.load(path))
        return self._tokenizer

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Run text work in the one thread that is for it. Raises QueueFull when too much of it waits."""
        if self._waiting >= self.engine.config.max_queue:
            raise QueueFull(f"the texts of {self._waiting} requests are being read; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._waiting -= 1

    @staticmethod
    def answer_id() -> str:
        """For the id of an answer: the request's own, by which log and traces know it, and what tells it from other
        requests to which a client gave the same."""
        return f"{request_id.get()}-{secrets.token_hex(4)}"

    def submit(self, jobs: tuple[Job, ...], model: str, metadata: Metadata) -> list[JobStream]:
        """All jobs of a request to a model, or none; here the version of an adapter is fixed. Outside scorers see the
        metadata. Raises Draining, NotReady, QueueFull, InvalidRequest, and UnknownModel for an adapter that has just
        been unloaded."""
        places = self.engine.config.max_queue
        if len(jobs) > places:  # waiting would not help
            raise InvalidRequest(f"`prompt` holds {len(jobs)} prompts; the server takes {places} at once", "prompt")
        self.engine.check_room(len(jobs), self.priority)
        adapter = None if model == self.engine.info.model.id else self.engine.adapters.version(model)
        made = [replace(job, adapter=adapter, priority=self.priority) for job in jobs]
        return [self.engine.submit(job, metadata) for job in made]

    def close(self) -> None:
        """No more text work."""
        self._executor.shutdown(wait=False, cancel_futures=True)
