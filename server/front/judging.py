"""What the outside scorers say of one job: asked for all of them at once, and kept until the job ends, so that a second
run after a worker's death asks nothing twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from server.scorers.calls import Metadata
from server.scorers.scorer import Scorer
from server.types import Job
from server.wire.messages import Ask, Judged


class Judging:
    """The scores of one job's texts. `scorers` are all outside scorers by name; the job's own are those that its
    guidance names."""

    def __init__(self, job: Job, metadata: Metadata, scorers: Mapping[str, Scorer]) -> None:
        named = (weighted.model for weighted in job.guidance.scorers)
        self._scorers = [scorers[name] for name in named if name in scorers]
        self._conversation, self._metadata, self._deadline = job.conversation, metadata, job.deadline
        self._known: dict[str, dict[str, float]] = {}  # text -> scorer -> score
        self._asking = asyncio.Lock()  # a second run waits for what the first one has asked

    def check(self) -> None:
        """Raises ScorerUnavailable for a job one of whose scorers is left alone: its work would be for nothing."""
        for scorer in self._scorers:
            scorer.check()

    async def judge(self, ask: Ask) -> Judged:
        """The answer to a worker's question; without scores when the deadline is there first. Raises ScorerFailed and
        ScorerUnavailable."""
        try:
            async with asyncio.timeout(None if self._deadline is None else self._deadline - time.time()), self._asking:
                await self._learn([text for text in dict.fromkeys(ask.texts) if text not in self._known])
        except TimeoutError:
            return Judged(ask.job_id, ask.step, None)
        scores = {scorer.name: [self._known[text][scorer.name] for text in ask.texts] for scorer in self._scorers}
        return Judged(ask.job_id, ask.step, scores)

    async def _learn(self, texts: list[str]) -> None:
        """Ask every scorer for these texts, none where there are none."""
        if not texts:
            return
        pairs = [(self._conversation, text) for text in texts]
        asked = [asyncio.ensure_future(scorer.score(pairs, self._metadata)) for scorer in self._scorers]
        try:
            answers = await asyncio.gather(*asked)
        finally:
            for each in asked:
                each.cancel()
        for index, text in enumerate(texts):
            self._known[text] = {
                scorer.name: answer[index] for scorer, answer in zip(self._scorers, answers, strict=True)
            }
