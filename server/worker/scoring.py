"""Rewards of given texts, between denoising steps: the worker's side of `/v1/score` and `/v1/rerank`.

Items of all waiting requests for one reward model are packed together, a bounded number of tokens a step, and read
only then, so a long list of documents does not hold up the jobs that are being denoised.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.errors import InvalidRequest
from server.rewards.text_reward import TextReward
from server.wire.messages import Event, Score, Scored
from server.worker.demand import named
from server.worker.failures import failed, free_memory

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Request:
    """A request as far as it is done: `scores` of its first items, `tokens` of all that have been tokenised, and the
    ids of one that has been and did not fit into the last pack."""

    message: Score
    scores: list[float] = field(default_factory=list)
    tokens: int = 0
    read_ahead: list[int] | None = None


class Scorer:
    """The queue of items to be scored, first come, first served. `step_tokens` bounds the tokens of one step;
    a longer item goes alone."""

    def __init__(self, reward_models: Mapping[str, TextReward], step_tokens: int) -> None:
        self._reward_models = reward_models
        self._step_tokens = step_tokens
        self._requests: dict[str, _Request] = {}  # by id, in order of arrival

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def add(self, request: Score) -> None:
        """Queue a request. Raises InvalidRequest for an unknown reward model; an item that it cannot hold fails the
        request in the step that would read it."""
        named(request.reward_model, self._reward_models, "model")
        self._requests[request.id] = _Request(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request, if it is known."""
        self._requests.pop(request_id, None)

    def step(self) -> list[Event]:
        """Score one pack of items; the answers of the requests that are complete with it, and the failures of those
        with an item that cannot be scored."""
        events: list[Event] = []
        if pack := self._pack(events):
            self._score(pack, events)
        for request in list(self._requests.values()):
            if len(request.scores) == len(request.message.items):
                self.cancel(request.message.id)
                events.append(Scored(request.message.id, request.scores, request.tokens))
        return events

    def _pack(self, events: list[Event]) -> list[tuple[_Request, list[int]]]:
        """The next items for one reward model, up to `step_tokens` tokens."""
        pack: list[tuple[_Request, list[int]]] = []
        room = self._step_tokens
        for request in list(self._requests.values()):
            if pack and request.message.reward_model != pack[0][0].message.reward_model:
                break
            try:
                for index in range(len(request.scores), len(request.message.items)):
                    ids = self._read(request, index)
                    if pack and len(ids) > room:
                        request.read_ahead = ids
                        return pack
                    pack.append((request, ids))
                    room -= len(ids)
            except Exception as error:
                self._fail(request, error, events)
                pack = [each for each in pack if each[0] is not request]
        return pack

    def _read(self, request: _Request, index: int) -> list[int]:
        """Tokenise an item, unless that has been done. Raises InvalidRequest for one that is too long."""
        if (ids := request.read_ahead) is not None:
            request.read_ahead = None
            return ids
        model = self._reward_models[request.message.reward_model]
        ids = model.sequence(*request.message.items[index])
        if len(ids) > model.info.context_length:
            raise InvalidRequest(
                f"item {index} takes {len(ids)} tokens; the context of the reward model is {model.info.context_length}",
                "documents",
            )
        request.tokens += len(ids)
        return ids

    def _score(self, pack: Sequence[tuple[_Request, list[int]]], events: list[Event]) -> None:
        """Score a pack at once, or, if that raises, item by item: one that cannot be scored fails its own request."""
        model = self._reward_models[pack[0][0].message.reward_model]
        try:
            rewards = model.score([ids for _, ids in pack]).tolist()
        except Exception as error:
            if len(pack) == 1:
                self._fail(pack[0][0], error, events)
                return
            logger.warning("a pack of %d items broke; they are scored one by one", len(pack), exc_info=error)
        else:
            for (request, _), reward in zip(pack, rewards, strict=True):
                request.scores.append(float(reward))
            return
        free_memory()  # it may be what the pack lacked
        for each in pack:
            if each[0].message.id in self._requests:  # no item before it has failed
                self._score([each], events)

    def _fail(self, request: _Request, error: Exception, events: list[Event]) -> None:
        self.cancel(request.message.id)
        events += failed([request.message.id], error)
