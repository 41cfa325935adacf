"""Scorers that are Python functions, in processes of their own: whatever one does there, the server goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from server.errors import ConfigurationError, EngineFailed
from server.scorers.calls import CallFailed, Metadata, Pair, finite, turns
from server.wire.child import Child
from server.wire.config import OutsideScorer
from server.wire.messages import LENGTH, MAX_FRAME_BYTES, ChannelClosed

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for a process to import the function's module


@dataclass(slots=True, eq=False)
class _Place:
    """For one process, which is there from the first call on, and for one call at a time."""

    child: Child | None = None


class Function:
    """A function as a target: `calls` processes at most, each with one call at a time, so that it is known which call
    one died of. A process that dies or does not answer in time is replaced by the next call."""

    def __init__(self, scorer: OutsideScorer) -> None:
        self._scorer = scorer
        self._command = (sys.executable, "-P", "-m", "server.scorers.child", scorer.target.removeprefix("python:"))
        self._free = [_Place() for _ in range(scorer.calls)]  # the last one used has a process

    async def start(self) -> None:
        """Start one process, to see that the function is there. Raises ConfigurationError."""
        try:
            self._free[-1].child = await self._started()
        except EngineFailed as error:
            raise ConfigurationError(f"scorers: {self._scorer.name}: {error.message}") from error

    def batches(self, pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
        """The pairs in parts for one call each: a function takes any number."""
        yield pairs

    async def ask(self, pairs: Sequence[Pair], metadata: Metadata) -> list[float]:
        """One finite score a pair, in order. Raises CallFailed. No more calls run at a time than there are places."""
        place = self._free.pop()
        try:
            return await self._call(place, pairs, metadata)
        finally:
            self._free.append(place)

    async def close(self) -> None:
        """End all processes."""
        for place in self._free:
            await self._end(place)

    async def _end(self, place: _Place) -> None:
        """End a place's process, if there is one."""
        child, place.child = place.child, None
        if child is not None:
            how = await asyncio.shield(child.reap())
            logger.info("the process of scorer %s ended with %s", self._scorer.name, how)

    async def _started(self) -> Child:
        """A process that has imported the function. Raises ConfigurationError when it cannot, EngineFailed."""
        child = await Child.spawn(self._command)
        try:
            async with asyncio.timeout(START_SECONDS):
                told = json.loads(await child.body())
            if told:
                raise ConfigurationError(f"scorers: {self._scorer.name}: {told['raised']}: {told['words']}")
        except BaseException as error:
            how = await asyncio.shield(child.reap())
            if isinstance(error, TimeoutError | ChannelClosed):
                raise EngineFailed(f"a process has not imported it in {START_SECONDS:g} seconds ({how})") from error
            raise
        return child

    async def _call(self, place: _Place, pairs: Sequence[Pair], metadata: Metadata) -> list[float]:
        # What texts share is sent once, or a small request would make a large frame.
        groups = [(turns(shared), [text for _, text in of]) for shared, of in groupby(pairs, lambda pair: pair[0])]
        asked = json.dumps([groups, metadata]).encode()
        if len(asked) > MAX_FRAME_BYTES:
            raise CallFailed("refused", f"takes at most {MAX_FRAME_BYTES} bytes in one call")
        limit = self._scorer.timeout_seconds
        try:
            if place.child is not None and place.child.exited():
                await self._end(place)
            child = place.child = place.child or await self._started()
            child.send(LENGTH.pack(len(asked)) + asked)
            async with asyncio.timeout(limit):
                told = await child.body()
        except BaseException as error:
            await self._end(place)
            if isinstance(error, TimeoutError):
                raise CallFailed("timeout", f"did not answer within {limit:g} seconds") from error
            if isinstance(error, ChannelClosed):
                raise CallFailed("died", "ended its process") from error
            if isinstance(error, EngineFailed | ConfigurationError):
                raise CallFailed("died", "does not start any more") from error
            raise
        scores = json.loads(told)
        if isinstance(scores, dict):  # its words may hold a client's text
            logger.warning("scorer %s raised %s\n%s", self._scorer.name, scores["raised"], scores["where"])
            raise CallFailed("raised", f"raised {scores['raised']}")
        return finite(scores, len(pairs))
