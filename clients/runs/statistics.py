"""Intervals, paired differences and their correction for how many there are, by scipy and statsmodels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

RESAMPLES = 9999


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if abs(self.mean) < 100 else 0
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interval(values: Sequence[float]) -> Interval:
    """The mean of the values with the percentile bootstrap's interval; of a single value it has no width. The resamples
    are the same each time."""
    from scipy import stats

    mean = fmean(values)
    if len(set(values)) == 1:
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (values,), lambda sample, axis: sample.mean(axis=axis), n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more a setting has than the baseline, over the prompts that both have; `p` by the paired permutation
    test (signs flipped), after Holm's correction."""

    change: Interval
    p: float
    prompts: int


def differences(baseline: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> dict[str, Difference]:
    """The difference of each of `others` (by name, each by prompt) to the baseline; those that share no prompt with it
    are left out."""
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    changes = {
        name: [values[prompt] - baseline[prompt] for prompt in baseline if prompt in values]
        for name, values in others.items()
    }
    changes = {name: values for name, values in changes.items() if values}
    tested = {
        name: stats.permutation_test(
            (values,),
            lambda sample, axis: sample.mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            rng=0,
        ).pvalue
        for name, values in changes.items()
    }
    if not tested:
        return {}
    _, corrected, _, _ = multipletests([*tested.values()], method="holm")
    return {
        name: Difference(interval(values), float(p), len(values))
        for (name, values), p in zip(changes.items(), corrected, strict=True)
    }
