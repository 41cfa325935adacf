"""Training batches for the diffusion model: prompts, canvases, masks.

A sequence is a prompt followed by a canvas that holds the answer, <|endoftext|>, and <|endoftext|> up to its end, as
the server lays it out. Its total length is drawn per batch, so that the canvas' length tells nothing about the
answer's: a model that saw only tight canvases would fill whatever room it is given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.corpus import Corpus, Example, Form
from demo.tokenizer import END_OF_TEXT, MASK, chat_text, token_id

CHAT_ROWS, RAW_ROWS = 12, 8  # sequences a batch
CHAT_TOTALS = (42, 48, 56, 64, 72)  # total lengths in tokens: canvases of about 25 to 60
RAW_TOTALS = (32, 38, 46, 56, 64)
CONTINUATION_SHARE = 0.35  # of the raw sequences


@dataclass(frozen=True)
class Batch:
    """Packed sequences with masks put in.

    `tokens` (S,) holds the mask token at `rows` (N,), packed indices; `targets` (N,) are the tokens that were there;
    `weights` (N,) sum to 1 and give every sequence the same say.
    """

    lengths: tuple[int, ...]
    tokens: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor


class BatchMaker:
    """An endless, seeded stream of batches."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.eos = token_id(tokenizer, END_OF_TEXT)
        self.mask = token_id(tokenizer, MASK)

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of prompt (templated for "chat") and answer, each tokenised by itself as the server does."""
        prompt = example.prompt
        if example.form == "chat":
            turns = [("user", prompt)]
            if example.system is not None:
                turns.insert(0, ("system", example.system))
            prompt = chat_text(turns, add_generation_prompt=True)
        return self.tokenizer.encode(prompt).ids, self.tokenizer.encode(example.answer).ids

    def _sequence(self, form: Form, total: int) -> tuple[list[int], list[int]]:
        """(prompt, canvas) that fill `total` tokens and in which the answer ends."""
        while True:
            prompt, answer = self.encode(self.corpus.draw(form))
            room = total - len(prompt) - len(answer)
            if room >= 1:
                return prompt, answer + [self.eos] * room

    def _sequences(self) -> Iterator[tuple[list[int], list[int]]]:
        total = self.rng.choice(CHAT_TOTALS)
        for _ in range(CHAT_ROWS):
            yield self._sequence("chat", total)
        total = self.rng.choice(RAW_TOTALS)
        for _ in range(RAW_ROWS):
            form: Form = "continuation" if self.rng.random() < CONTINUATION_SHARE else "raw"
            yield self._sequence(form, total)

    def next(self) -> Batch:
        """Draw the next batch. The share of masked positions is spread evenly over (0, 1] within it."""
        sequences = list(self._sequences())
        # Stratified shares: one in each of B equal slices, in random order, for a calmer loss.
        slices = torch.randperm(len(sequences), generator=self.generator)
        shares = (slices + torch.rand(len(sequences), generator=self.generator)) / len(sequences)
        flat: list[int] = []
        rows: list[Tensor] = []
        weights: list[Tensor] = []
        for (prompt, canvas), share in zip(sequences, shares.tolist(), strict=True):
            count = max(1, round(share * len(canvas)))
            chosen = torch.randperm(len(canvas), generator=self.generator)[:count].sort().values
            rows.append(len(flat) + len(prompt) + chosen)
            weights.append(torch.full((count,), 1.0 / (count * len(sequences))))
            flat += prompt + canvas
        tokens, packed_rows = torch.tensor(flat), torch.cat(rows)
        targets = tokens[packed_rows]
        tokens[packed_rows] = self.mask
        lengths = tuple(len(prompt) + len(canvas) for prompt, canvas in sequences)
        return Batch(lengths, tokens, packed_rows, targets, torch.cat(weights))
