"""Which of a classifier's logits is the reward: the labels of a checkpoint, and the one that the settings name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from server.errors import ConfigurationError, quote
from server.types import RewardOutput


def labels_of(config: Mapping[str, Any], rows: int | None) -> tuple[str, ...]:
    """The names of a checkpoint's labels, by number, from its config.json and the `rows` of its head, None where these
    are not known. Labels without a name have transformers' (LABEL_0). Raises ConfigurationError where the two disagree.
    """
    named = config.get("id2label") or {}
    if not isinstance(named, dict) or named.keys() != {str(index) for index in range(len(named))}:
        raise ConfigurationError(f"id2label: must name the labels by number, from 0 on, not {quote(named)}")
    told = len(named) or config.get("num_labels")
    if told is not None and rows is not None and told != rows:
        raise ConfigurationError(f"num_labels: config.json tells of {quote(told)} labels, the head has {rows} rows")
    count = rows or told or 2  # as transformers has it
    return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(count))


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a classifier's logits is the reward: that of label number `index`, or its log p(label), p being the
    softmax over all labels. `label` is its name, None where there is no other label."""

    index: int = 0
    output: RewardOutput = "logit"
    label: str | None = None

    @classmethod
    def named(
        cls, label: int | str | None, output: RewardOutput, labels: tuple[str, ...], problem_type: str | None = None
    ) -> Reading:
        """Of `labels` the one that the settings name: by its name, or else by its number, which may be a string too.
        Raises ConfigurationError, which names the key and lists the labels."""
        several = len(labels) > 1
        if label is None and several:
            raise ConfigurationError(f"label: name one of its {len(labels)} labels: {_listed(labels)}")
        if label is None:
            index = 0
        elif isinstance(label, str) and label in labels:
            index = labels.index(label)
        else:
            index = int(label) if str(label).isdecimal() else -1
        if not 0 <= index < len(labels):
            raise ConfigurationError(f"label: there is no {quote(label)}; the labels are {_listed(labels)}")
        if output == "log_softmax" and not several:
            raise ConfigurationError("output: log_softmax of one label is always 0; use logit")
        if output == "log_softmax" and problem_type not in (None, "single_label_classification"):
            exclusive = f"is for labels that exclude each other, and problem_type is {quote(problem_type)}"
            raise ConfigurationError(f"output: log_softmax {exclusive}; use logit")
        return cls(index, output, labels[index] if several else None)

    def of(self, logits: Tensor) -> Tensor:
        """Rewards (B,) of logits (B, C)."""
        return (logits if self.output == "logit" else logits.log_softmax(-1))[:, self.index]

    def gradient(self, logits: Tensor, weight: Tensor) -> Tensor:
        """Their gradient (B, d) with respect to what a linear head, of this weight (C, d), made the logits of."""
        if self.output == "logit":
            return weight[self.index].expand(len(logits), -1)
        g = -logits.softmax(-1)
        g[:, self.index] += 1
        return g @ weight


ONE_LABEL = Reading()
"""Of a head that has no other label."""


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(f"{index} ({quote(label)})" for index, label in enumerate(labels))
