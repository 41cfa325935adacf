"""Rewards of given texts, between denoising steps: the worker's side of `/v1/score` and `/v1/rerank`.

Items of all waiting requests for one reward model are packed together, a bounded number of tokens a step, so
a long list of documents does not hold up the jobs that are being denoised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.engine.messages import Event, Score, Scored
from server.errors import InvalidRequest, quote
from server.rewards.reward_model import RewardModel
from server.text.template import conversation_ids


@dataclass(slots=True)
class _Request:
    """Scores as they come in; None where an item has not been scored. `tokens` of all items."""

    id: str
    scores: list[float | None] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Item:
    request: _Request
    index: int
    reward_model: str
    token_ids: list[int]


class Scorer:
    """The queue of items to be scored, first come, first served. `step_tokens` bounds the tokens of one step;
    a longer item goes alone."""

    def __init__(self, reward_models: Mapping[str, RewardModel], step_tokens: int) -> None:
        self._reward_models = reward_models
        self._step_tokens = step_tokens
        self._items: deque[_Item] = deque()
        self._empty: list[str] = []
        self._in_step: list[_Item] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._items or self._empty)

    def add(self, request: Score) -> None:
        """Queue a request. Raises InvalidRequest for an unknown reward model or an item that it cannot
        hold."""
        model = self._reward_models.get(request.reward_model)
        if model is None:
            names = ", ".join(sorted(self._reward_models)) or "none"
            raise InvalidRequest(f"reward model {quote(request.reward_model)} is not loaded; loaded: {names}", "model")
        pending = _Request(request.id, [None] * len(request.items))
        items = []
        for index, (conversation, response) in enumerate(request.items):
            token_ids = conversation_ids(model.tokenizer, conversation, response)
            if len(token_ids) > model.info.context_length:
                raise InvalidRequest(
                    f"item {index} takes {len(token_ids)} tokens; the context of the reward model is "
                    f"{model.info.context_length}",
                    "documents",
                )
            pending.tokens += len(token_ids)
            items.append(_Item(pending, index, request.reward_model, token_ids))
        self._items.extend(items)
        if not items:
            self._empty.append(request.id)

    def cancel(self, request_id: str) -> bool:
        """Forget a request. Returns whether it was known."""
        known = any(item.request.id == request_id for item in self._items)
        self._items = deque(item for item in self._items if item.request.id != request_id)
        return known

    def abort_running(self) -> list[str]:
        """Drop the requests of the step that failed; returns their ids."""
        ids = list(dict.fromkeys(item.request.id for item in self._in_step))
        self._in_step = []
        for request_id in ids:
            self.cancel(request_id)
        return ids

    def step(self) -> list[Event]:
        """Score one pack of items; the answers of the requests that are complete with it."""
        events: list[Event] = [Scored(request_id, [], 0) for request_id in self._empty]
        self._empty = []
        if not self._items:
            return events
        self._in_step = self._pack()
        model = self._reward_models[self._in_step[0].reward_model]
        rewards = model.score([item.token_ids for item in self._in_step]).tolist()
        touched: dict[str, _Request] = {}
        for item, reward in zip(self._in_step, rewards, strict=True):
            item.request.scores[item.index] = float(reward)
            touched[item.request.id] = item.request
        self._in_step = []
        for request in touched.values():
            scores = [score for score in request.scores if score is not None]
            if len(scores) == len(request.scores):
                events.append(Scored(request.id, scores, request.tokens))
        return events

    def _pack(self) -> list[_Item]:
        """The next items for one reward model, up to `step_tokens` tokens."""
        pack = [self._items.popleft()]
        tokens = len(pack[0].token_ids)
        while self._items and self._items[0].reward_model == pack[0].reward_model:
            tokens += len(self._items[0].token_ids)
            if tokens > self._step_tokens:
                break
            pack.append(self._items.popleft())
        return pack
