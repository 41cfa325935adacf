"""The worker process: owns the device, takes jobs from the HTTP process, runs one denoising step after the
other.

Started as `python -m server.worker.loop FD`, where FD is its end of a socketpair. The first message says
which models to load. It runs until it is told to stop or the other end closes, so it never outlives its
parent: the main thread sees the end of file between steps, and the heartbeat thread sees it within a second
even while a step hangs.

This module imports no torch by itself, so that `main` can run another service than the real one: anything with the
`info`, `runner`, `scorer`, `check_device` and `set_adapters` of worker/service.LoadedService.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from server import log
from server.errors import AnswerTooLarge, ConfigurationError, EngineFailed
from server.methods import load_plugins
from server.wire.channel import WorkerChannel
from server.wire.config import WorkerConfig
from server.wire.messages import (
    Begun,
    Cancel,
    ChannelClosed,
    Configure,
    Event,
    Failed,
    Finished,
    FrameTooLarge,
    Heartbeat,
    Judged,
    Ready,
    Score,
    Scored,
    SetAdapters,
    Shutdown,
    Submit,
    ToWorker,
    WorkerError,
    frame,
    subject,
)
from server.wire.stats import RunnerStats
from server.worker.failures import failed

if TYPE_CHECKING:
    from server.worker.service import LoadedService

logger = logging.getLogger(__name__)

MESSAGE_CHARACTERS = 2000
SUSPICIOUS = ("internal", "out_of_memory")
"""Kinds of failure for which the device may be to blame."""

Load = Callable[[WorkerConfig], "LoadedService"]


def import_service() -> Load:
    """What loads the real service. It imports torch and the models' code, which takes seconds that a spare worker has
    spent before it is needed."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # The blocks of a step are a little smaller than those of the one before. Segments that grow leave no gaps.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    from server.worker.service import load

    return load


class Loop:
    """Messages in, steps, events out."""

    def __init__(self, channel: WorkerChannel, service: LoadedService) -> None:
        self._channel = channel
        self._service = service
        self._pass_began: float | None = None  # when the present pass did; the heartbeat thread reads it

    def run(self) -> None:
        """Until Shutdown. An exception that can be laid to some requests becomes their Failed events in the runner and
        the scorer; what passes ends the worker: ChannelClosed when the parent is gone, and whatever breaks the device.
        """
        runner, scorer = self._service.runner, self._service.scorer
        # At once, not with the step's other events: there will be none if the step kills us.
        runner.begin = lambda job_id: self._channel.send([Begun(job_id)])
        while True:
            self._pass_began = None
            messages = self._channel.receive(block=not (runner.has_work or scorer.has_work))
            self._pass_began = time.monotonic()
            for message in messages:
                if isinstance(message, Shutdown):
                    return
                self._send(self._take(message))
            for each in (scorer, runner):
                if each.has_work:
                    events = each.step()
                    self._send(events)
                    if any(isinstance(event, Failed) and event.kind in SUSPICIOUS for event in events):
                        self._service.check_device()

    def heartbeat(self) -> Heartbeat:
        """The state of this moment. Safe to call from another thread."""
        began = self._pass_began
        seconds = 0.0 if began is None else time.monotonic() - began
        return Heartbeat(self._service.runner.stats, seconds)

    def _take(self, message: ToWorker) -> list[Event]:
        runner, scorer = self._service.runner, self._service.scorer
        if isinstance(message, Cancel):
            runner.cancel(message.id)
            scorer.cancel(message.id)
            return []
        if isinstance(message, Judged):
            runner.judged(message)
            return []
        if isinstance(message, SetAdapters):
            return [self._service.set_adapters(message.folders)]
        if not isinstance(message, Submit | Score):
            raise ChannelClosed(f"unexpected {type(message).__name__}")
        try:
            if isinstance(message, Submit):
                runner.add(message.job, time.time())
            else:
                scorer.add(message)
        except Exception as error:
            return failed([message.job.id if isinstance(message, Submit) else message.id], error)
        return []

    def _send(self, events: list[Event]) -> None:
        if not events:
            return
        frames = []
        if any(isinstance(event, Finished | Scored | Failed) for event in events):
            # Whoever has the answer finds it counted.
            frames.append(frame(self.heartbeat()))
        for event in events:
            try:
                frames.append(frame(event))
            except (FrameTooLarge, TypeError) as error:
                job_id = subject(event)
                if job_id is None:
                    raise
                logger.error("an event of job %s cannot be sent", job_id, exc_info=error)
                self._service.runner.cancel(job_id)
                fault = EngineFailed("an internal error")
                if isinstance(error, FrameTooLarge):
                    fault = AnswerTooLarge("the answer is too large")
                frames.append(frame(Failed.of(job_id, fault)))
        self._channel.send_frames(frames)


def beat(channel: WorkerChannel, make: Callable[[], Heartbeat], seconds: float) -> None:
    """Send heartbeats for ever; the heartbeat thread. Ends the process when the parent is gone."""
    while True:
        try:
            channel.send([make()])
        except ChannelClosed:
            os._exit(1)  # the main thread may hang in a step; nothing is left to be saved
        time.sleep(seconds)


def serve(channel: WorkerChannel, prepare: Callable[[], Load]) -> None:
    """Prepare, wait for the configuration, load, report ready, and run the loop. What goes wrong on the way becomes a
    WorkerError, the last words: they reach the operator's log, never a client."""
    doing = "importing the worker's code"
    try:
        load = prepare()
        first = channel.receive(block=True)
        if not isinstance(first[0], Configure) or len(first) > 1:
            raise ChannelClosed("the first message must be Configure, and nothing may follow before Ready")
        config = first[0].config
        log.configure(config.log_level, config.log_format)
        beats: list[Callable[[], Heartbeat]] = [lambda: Heartbeat(RunnerStats())]
        threading.Thread(
            target=beat, args=(channel, lambda: beats[-1](), config.heartbeat_seconds), name="heartbeat", daemon=True
        ).start()
        doing = "loading or warm-up"
        load_plugins(config.plugins)
        service = load(config)
        loop = Loop(channel, service)
        beats.append(loop.heartbeat)
        channel.send([Ready(service.info)])
        doing = "going on"
        loop.run()
    except ChannelClosed:
        raise
    except ConfigurationError as error:
        channel.send([WorkerError(str(error)[:MESSAGE_CHARACTERS], configuration=True)])
    except Exception as error:
        logger.error("%s failed", doing, exc_info=error)
        channel.send([WorkerError(f"{doing} failed: {type(error).__name__}: {error}"[:MESSAGE_CHARACTERS])])


def main(prepare: Callable[[], Load] = import_service) -> int:
    """Take the socket named on the command line and serve on it what `prepare` gives. Returns the exit status."""
    # The parent decides when we end, by a message or by closing the socket: a Ctrl-C or a service manager's SIGTERM
    # to all processes must not take the worker away from requests that are still being drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.set_inheritable(False)
        try:
            serve(WorkerChannel(sock), prepare)
        except ChannelClosed:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
