"""Prompts under several settings, asked and measured: what `compare` and `eval` have in common."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..arguments import add_option, server_url, whole
from ..errors import ClientError
from ..types import Scores
from .answers import Answer, body_of, by_prompt, completion_of, found_in, read, unexpected
from .engine import Servers, answer_all
from .journal import Journal, Record, Request, request
from .judge import Judge
from .rows import data_file
from .sources import Prompt
from .statistics import Difference, Interval, differences, interval
from .sweep import Asked, Setting, asked, models_of, servers_of, settings_of

HEADLINE = "Top@1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one set of prompts came to under one reward model, since rewards of two do not compare. By setting: the
    measures with their intervals, the paired differences of Top@1 to the baseline, the mean reward after each step, and
    how many requests have no answer, or one without all its rewards."""

    name: str
    reward_model: str
    settings: Sequence[Setting]
    answers: Sequence[Answer]
    measures: Mapping[str, Mapping[str, Interval]]
    baseline: str
    differences: Mapping[str, Difference]
    curves: Mapping[str, Sequence[float]]
    unanswered: Mapping[str, int]

    @property
    def title(self) -> str:
        """What tables are headed."""
        return f"{self.name}, rewards by {self.reward_model}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where answers and reports go, and what is measured beside the rewards."""
    text = "the journal of all answers, to which they are appended; the same command goes on from it"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    text = "a folder for the report: Markdown, HTML, plots and JSON"
    add_option(parser, "--report", text, "none", type=Path, metavar="FOLDER")
    text = "a file for each answer's best and worst text in TRL's columns, .jsonl or .parquet"
    add_option(parser, "--pairs", text, "none", type=data_file, metavar="FILE")
    text = "the setting that the others are compared with, by its name in the table"
    add_option(parser, "--baseline", text, "the first with method bon, or else the first")
    text = "a served reward model that takes no part and scores all texts; repeatable"
    add_option(parser, "--held-out", text, "none", action="append", metavar="NAME")
    text = "prompts of each set that are asked once more for the reward after each step"
    add_option(parser, "--curves", text, type=whole, default=0)
    text = "an OpenAI-compatible server, of which a model judges the best texts in LMUnit's form"
    add_option(parser, "--judge-url", text, "none", type=server_url)
    add_option(parser, "--judge-model", "that model", "the first that it lists")
    add_option(parser, "--judge-key", "that server's API key", "the variable ENTRGI_API_KEY, if there is one")
    text = "what the judge is asked about each text; repeatable"
    add_option(parser, "--unit-test", text, "whether it answers correctly and helpfully", action="append")


class Study:
    """Sets of prompts under the command line's settings, against its servers."""

    def __init__(self, given: argparse.Namespace, sets: Mapping[str, Sequence[Prompt]], methods: Sequence[str]) -> None:
        self.given, self.servers = given, servers_of(given)
        self.served = models_of(self.servers)
        self.settings = settings_of(given, methods, self.served)
        if given.baseline is not None and given.baseline not in (names := [each.name for each in self.settings]):
            raise ClientError(f"--baseline {given.baseline!r} is none of the settings: {', '.join(names)}")
        self.sets = {name: prompts[: given.limit] for name, prompts in sets.items()}
        self.asked = {
            name: asked(enumerate(prompts), self.settings, given.seeds, raw=given.raw)
            for name, prompts in self.sets.items()
        }

    def run(self) -> list[Outcome]:
        """Ask what the journal does not hold, one kind of question after the other, and measure."""
        with Journal(self.given.out) as journal:
            everything = [each.request for asked_ in self.asked.values() for each in asked_]
            records = self._answered(everything, journal, self.servers, "answers")
            answers = {name: read(asked_, records, self.served) for name, asked_ in self.asked.items()}
            flat = [answer for found in answers.values() for answer in found]
            for model in self.given.held_out or ():
                self._score(flat, model, journal)
            if self.given.judge_url:
                self._judge(flat, journal)
            curves = {name: self._curves(name, journal) for name in self.sets}
        rewards = dict.fromkeys(each.reward_model for each in self.settings)
        return [self._outcome(name, reward, answers[name], curves[name]) for name in self.sets for reward in rewards]

    @staticmethod
    def _answered(requests: Sequence[Request], journal: Journal, servers: Servers, what: str) -> dict[str, Record]:
        answer_all(requests, journal, servers, what)
        return found_in(journal, {each.custom_id for each in requests})

    def _score(self, answers: Sequence[Answer], model: str, journal: Journal) -> None:
        """All texts under a reward model that had no part in them."""
        requests = [
            request("/v1/score", {"model": model, "queries": each.asked.prompt.query, "documents": list(each.texts)})
            for each in answers
        ]
        records = self._answered(requests, journal, self.servers, f"scores by {model}")
        for answer, sent in zip(answers, requests, strict=True):
            if sent.custom_id in records:
                scores = body_of(records[sent.custom_id], Scores)
                if len(scores.data) != len(answer.texts):
                    why = f"{len(scores.data)} scores of {len(answer.texts)} texts"
                    raise unexpected(records[sent.custom_id], why)
                answer.values[model] = [score.score for score in scores.data]

    def _judge(self, answers: Sequence[Answer], journal: Journal) -> None:
        """The best text of each answer, by another model."""
        judge = Judge.of(self.given, self.servers.concurrency)
        requests = [judge.requests(each.asked.prompt.text, each.texts[0]) for each in answers]
        records = self._answered([one for several in requests for one in several], journal, judge.servers, "judgements")
        for answer, several in zip(answers, requests, strict=True):
            scores = [judge.score(records[one.custom_id]) for one in several if one.custom_id in records]
            known = [score for score in scores if score is not None]
            if known:
                answer.values[judge.name] = [fmean(known)]

    def _curves(self, name: str, journal: Journal) -> dict[str, list[float]]:
        """By setting the mean reward after each step, for the least K of each series, over the trajectories of the
        first prompts, which are asked again with `trace`: that reads each step once more, so it is no part of the
        costs."""
        few = {prompt.id for prompt in self.sets[name][: self.given.curves]}
        least: dict[str, Setting] = {}  # the K of a series says nothing about one trajectory's steps
        for each in sorted(self.settings, key=lambda each: each.best_of):
            least.setdefault(each.series, each)
        first = [one for one in self.asked[name] if one.prompt.id in few and one.setting in least.values()]
        if not first:
            return {}
        traced = [(one.setting.name, traced_request(one)) for one in first]
        records = self._answered([one for _, one in traced], journal, self.servers, "rewards over steps")
        found: dict[str, list[list[float | None]]] = {}
        for setting, one in traced:
            if one.custom_id in records:
                for trajectories in completion_of(records[one.custom_id]).trace or ():
                    found.setdefault(setting, []).extend(
                        [step.reward_after for step in steps] for steps in trajectories
                    )
        return {setting: mean_curve(runs) for setting, runs in found.items()}

    def _outcome(
        self, name: str, reward: str, answers: Sequence[Answer], curves: Mapping[str, Sequence[float]]
    ) -> Outcome:
        settings = [each for each in self.settings if each.reward_model == reward]
        names = {each.name for each in settings}
        own = [answer for answer in answers if answer.asked.setting.name in names]
        values = {each.name: found for each in settings if (found := by_prompt(own, each.name))}
        if not values:
            raise ClientError(f"no request of {name} was answered: the journal has the servers' words")
        likely = (self.given.baseline, *(each.name for each in settings if each.method == "bon"), *values)
        baseline = next(each for each in likely if each in values)
        others = {setting: found[HEADLINE] for setting, found in values.items() if setting != baseline}
        return Outcome(
            name,
            reward,
            settings,
            own,
            {
                setting: {measure: interval([*rows.values()]) for measure, rows in measures.items()}
                for setting, measures in values.items()
            },
            baseline,
            differences(values[baseline][HEADLINE], others),
            {setting: curve for setting, curve in curves.items() if setting in names},
            dict(
                Counter(each.setting.name for each in self.asked[name] if each.setting.name in names)
                - Counter(answer.asked.setting.name for answer in own)
            ),
        )


def traced_request(each: Asked) -> Request:
    """The same generation with what every step did."""
    return request(each.request.url, {**each.request.body, "trace": True})


def mean_curve(runs: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean at each step over the runs that have a reward there; steps without any are left out."""
    length = max((len(run) for run in runs), default=0)
    at = ([run[step] for run in runs if step < len(run)] for step in range(length))
    known = ([value for value in values if value is not None] for values in at)
    return [fmean(values) for values in known if values]
