"""What rewards say of texts: those of finished trajectories, and of what unfinished ones would say now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from server.errors import InvalidRequest, NotFinite
from server.rewards.text_reward import TextReward
from server.types import Job
from server.wire.messages import Ask, Event
from server.worker.book import Entry, Rewards
from server.worker.failures import Attempt


class Judge:
    """All that rewards texts in this process, by name. `ran_out` is called when memory runs out, to free what can be
    freed."""

    def __init__(self, models: Mapping[str, TextReward], ran_out: Callable[[], None]) -> None:
        self._models, self._ran_out = models, ran_out

    def judge(self, entry: Entry, step: int, texts: Sequence[str], events: list[Event]) -> Rewards | None:
        """The rewards of the texts of all K trajectories; None where outside scorers have been asked for theirs: until
        they have answered the entry is parked."""
        outside = self.outside(entry.job)
        (asked, rewards), heard = entry.rewards or (None, []), entry.heard
        entry.rewards = entry.heard = None
        if asked != step:  # a deadline may end a job that has been answered before it goes on
            whole = [entry.job.whole(text) for text in texts]
            try:
                rewards = self.rewards(entry.job, whole)
            except InvalidRequest as error:  # a text that is too long for a reward
                when = f"as the text would be after {step} steps: " if step >= 0 else ""
                raise InvalidRequest(f"{when}{error.message}", error.param) from error
            if outside and not entry.stopped:
                entry.park(step, rewards)
                events.append(Ask(entry.job.id, step, whole))
                return None
        elif heard is not None:
            for name in outside:
                for reward, score in zip(rewards, heard[name], strict=True):
                    reward[name] = score
        return rewards

    def outside(self, job: Job) -> list[str]:
        """Names of the job's scorers that are none of this process, and must be asked."""
        return [scorer.model for scorer in job.guidance.scorers if scorer.model not in self._models]

    def rewards(self, job: Job, texts: Sequence[str]) -> Rewards:
        """R of each whole text as the response of the job's conversation (algorithm.md, end of section 2), by name of
        the reward; None for those that must be asked. Raises NotFinite."""
        rewards: Rewards = [{} for _ in texts]
        for name in [each.model for each in job.guidance.rewards]:
            scores = self._scores(name, job, texts) if name in self._models else [None for _ in texts]
            if not all(score is None or math.isfinite(score) for score in scores):
                raise NotFinite(f"{name} gave a reward that is not finite")
            for reward, score in zip(rewards, scores, strict=True):
                reward[name] = score
        return rewards

    def _scores(self, name: str, job: Job, texts: Sequence[str]) -> list[float]:
        """In as few passes as the reward takes; when memory runs out, once more, text by text. Equal texts are read
        once: so their rewards are equal, and not only up to rounding."""
        model, distinct = self._models[name], list(dict.fromkeys(texts))
        sequences = [model.sequence(job.conversation, text) for text in distinct]
        with Attempt(self._ran_out) as attempt:
            scores: list[float] = model.score(sequences).tolist()
        if attempt.ran_out:
            scores = [float(model.score([sequence])[0]) for sequence in sequences]
        of_text = dict(zip(distinct, scores, strict=True))
        return [of_text[text] for text in texts]
