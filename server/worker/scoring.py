"""Rewards of given texts, between denoising steps: the worker's side of `/v1/score` and `/v1/rerank`.

Items of all waiting requests for one reward model are packed together, a bounded number of tokens a step, and read
only then, so a long list of documents does not hold up the jobs that are being denoised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.errors import InvalidRequest, quote
from server.rewards.reward_model import RewardModel
from server.text.template import conversation_ids
from server.types import Message
from server.wire.messages import Event, Failed, Score, Scored


@dataclass(slots=True)
class _Request:
    """Scores as they come in; None where an item has not been scored. `tokens` of all items."""

    id: str
    scores: list[float | None] = field(default_factory=list)
    tokens: int = 0


@dataclass(slots=True)
class _Item:
    request: _Request
    index: int
    reward_model: str
    conversation: tuple[Message, ...]
    response: str
    token_ids: list[int] | None = None  # once it has been read


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
        """Queue a request. Raises InvalidRequest for an unknown reward model; an item that it cannot hold fails the
        request in the step that would read it."""
        if request.reward_model not in self._reward_models:
            names = ", ".join(sorted(self._reward_models)) or "none"
            raise InvalidRequest(f"reward model {quote(request.reward_model)} is not loaded; loaded: {names}", "model")
        pending = _Request(request.id, [None] * len(request.items))
        self._items.extend(
            _Item(pending, index, request.reward_model, conversation, response)
            for index, (conversation, response) in enumerate(request.items)
        )
        if not request.items:
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
        events += self._pack()
        if not self._in_step:
            return events
        model = self._reward_models[self._in_step[0].reward_model]
        rewards = model.score([item.token_ids or [] for item in self._in_step]).tolist()
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

    def _pack(self) -> list[Event]:
        """Move the next items for one reward model into the step, up to `step_tokens` tokens. A request with an item
        that cannot be scored leaves; its failure is returned."""
        failures: list[Event] = []
        tokens = 0
        while self._items and (not self._in_step or self._items[0].reward_model == self._in_step[0].reward_model):
            item = self._items.popleft()
            self._in_step.append(item)
            try:
                length = self._read(item)
            except InvalidRequest as error:
                failures.append(Failed(item.request.id, error.kind, error.message, error.param))
                self._in_step = [each for each in self._in_step if each.request is not item.request]
                self.cancel(item.request.id)
                continue
            if len(self._in_step) > 1 and tokens + length > self._step_tokens:
                self._items.appendleft(self._in_step.pop())
                break
            tokens += length
        return failures

    def _read(self, item: _Item) -> int:
        """Tokenise an item unless that has been done; returns its length. Raises InvalidRequest."""
        if item.token_ids is None:
            model = self._reward_models[item.reward_model]
            token_ids = conversation_ids(model.tokenizer, item.conversation, item.response)
            if len(token_ids) > model.info.context_length:
                raise InvalidRequest(
                    f"item {item.index} takes {len(token_ids)} tokens; the context of the reward model is "
                    f"{model.info.context_length}",
                    "documents",
                )
            item.token_ids = token_ids
            item.request.tokens += len(token_ids)
        return len(item.token_ids)
