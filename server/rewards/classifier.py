"""A published sequence classifier before it is loaded: where it is, which label is the reward, and what it reads.

Two kinds are told apart by where transformers keeps the head. A causal model has a `score`, which reads the last token:
it is a reward model, with a gradient. Every other one is an encoder, which has none here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from server.errors import ConfigurationError, quote
from server.hub import read_json, resolve_checkpoint
from server.models.lora import PREFIX, WEIGHTS_FILE, base_of, read_config, saved_modules
from server.models.weights import stored_tensors
from server.rewards.labels import Reading, labels_of
from server.types import RewardInput, RewardOutput

HEAD = "score.weight"
HEADS = (HEAD, "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")
"""Where a head has a row for each label."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A checkpoint in `folder`, with the folder of an `adapter` for its weights. The reward is the `reading` of the
    logits of `labels` labels. `input` is what an encoder reads, None for a causal model."""

    name: str
    folder: Path
    adapter: Path | None
    labels: int
    reading: Reading
    input: RewardInput | None


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """What is wrong with a reward model's checkpoint or settings is said with its name."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"reward model {name}: {error}") from error


def find_classifier(
    name: str,
    path_or_id: str | Path,
    label: int | str | None = None,
    output: RewardOutput = "logit",
    reads: RewardInput | None = None,
) -> Classifier:
    """The reward model of that name: a folder, `owner/name` or `owner/name@revision`, fetched if need be. The folder of
    an adapter names its base, and may bring a head. `label`, `output` and `reads` are a source's in the settings
    (`label`, `output`, `input`).

    Raises ConfigurationError, whose message names the reward model and the key or the file that is wrong.
    """
    with blaming(name):
        base, adapter = base_of(path_or_id)
        brings_head = adapter is not None and "score" in saved_modules(read_config(adapter))
        check = partial(check_config, headless=brings_head)
        folder = resolve_checkpoint(base, check_config=check)
        config = read_json(folder / "config.json")
        check(config)
        stored = stored_tensors(folder)
        if adapter is not None and brings_head:
            brought = stored_tensors(adapter, WEIGHTS_FILE)
            stored |= {HEAD: brought[PREFIX + HEAD]} if PREFIX + HEAD in brought else {}
            config = {key: value for key, value in config.items() if key not in ("id2label", "num_labels")}
        causal = any(each.startswith("score.") for each in stored)
        if adapter is not None and not causal:
            raise ConfigurationError("an encoder's adapter is not supported; merge it into its base")
        if causal and reads is not None:
            raise ConfigurationError("input: is for encoders; this model reads the conversation in its chat template")
        rows = next((stored[head].shape[0] for head in HEADS if head in stored), None)
        labels = labels_of(config, rows)
        reading = Reading.named(label, output, labels, config.get("problem_type"))
    return Classifier(name, folder, adapter, len(labels), reading, None if causal else reads or "response")


def check_config(config: Mapping[str, Any], *, headless: bool = False) -> None:
    """Refuse a config.json that is no classifier's; `headless`: nor the base of one, whose head an adapter brings.
    Raises ConfigurationError, which names the key."""
    architectures = config.get("architectures") or []
    if not headless and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise ConfigurationError(f"architectures: {quote(architectures)} is no sequence classifier, so no reward model")
    text = config.get("text_config") or config
    pad, size = text.get("pad_token_id"), text.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ConfigurationError(f"pad_token_id: {pad} is outside the vocabulary, whose vocab_size is {size}")
