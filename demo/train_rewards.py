"""Train the bundled reward models: small causal Qwen3 sequence classifiers, one label each.

Two things matter for guidance that do not show in a test score. The server drops hidden response positions but keeps
counting, so the template's last tokens may stand far after the text: training opens such gaps at random. And the
reward is read through *mixed* embeddings while positions are still masked: training blends some of them too, with
the grade unchanged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from demo.rewards_data import Graded, GradedTexts
from demo.tokenizer import END_OF_TEXT, IM_END, chat_text, token_id

MAX_TOKENS = 112
VALIDATION_SEED = 90_003


@dataclass(frozen=True)
class RewardTraining:
    """Settings. `minutes` caps the wall time of each model."""

    steps: int = 3000
    minutes: float = 14.0
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    clip: float = 1.0
    seed: int = 11


def reward_config(tokenizer: Tokenizer) -> Qwen3Config:
    """0.4 M parameters: two layers of width 96."""
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=token_id(tokenizer, IM_END),
        num_labels=1,
        attn_implementation="sdpa",
    )


@dataclass(frozen=True)
class RewardBatch:
    """Left-padded rows: ids, mask, position ids (B, n); `response` marks the response's tokens; `grades` (B,)."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    response: Tensor
    grades: Tensor


def encode(texts: list[Graded], tokenizer: Tokenizer, gaps: Tensor) -> RewardBatch:
    """Render and tokenise; row b's template suffix stands `gaps[b]` positions after its response."""
    pad = token_id(tokenizer, END_OF_TEXT)
    suffix = tokenizer.encode(f"{IM_END}\n").ids
    rows: list[tuple[list[int], int, int]] = []
    for text in texts:
        prefix = tokenizer.encode(chat_text([("user", text.prompt)], add_generation_prompt=True)).ids
        response = tokenizer.encode(text.response).ids[: MAX_TOKENS - len(prefix) - len(suffix)]
        rows.append((prefix + response + suffix, len(prefix), len(response)))
    width = max(len(ids) for ids, _, _ in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, pad)
    mask, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (tokens, prefix_length, response_length) in enumerate(rows):
        start = width - len(tokens)
        ids[row, start:] = torch.tensor(tokens)
        mask[row, start:] = 1
        positions[row, start:] = torch.arange(len(tokens))
        positions[row, -len(suffix) :] += gaps[row]
        response_mask[row, start + prefix_length : start + prefix_length + response_length] = True
    return RewardBatch(ids, mask, positions, response_mask, torch.tensor([text.grade for text in texts]))


def rewards(model: Qwen3ForSequenceClassification, batch: RewardBatch, embeds: Tensor | None = None) -> Tensor:
    """Rewards (B,), read at the last position, through `embeds` (B, n, D) when given."""
    if embeds is None:
        embeds = model.model.embed_tokens(batch.ids)
    states: Tensor = model.model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    scores: Tensor = model.score(states[:, -1]).squeeze(-1)
    return scores


def blended(model: Qwen3ForSequenceClassification, batch: RewardBatch, generator: torch.Generator) -> Tensor:
    """Embeddings in which up to a third of the response positions are blends with random other tokens."""
    embeds: Tensor = model.model.embed_tokens(batch.ids)
    size = batch.ids.shape
    share = torch.rand(size[0], 1, generator=generator) / 3
    chosen = batch.response & (torch.rand(size, generator=generator) < share)
    noise = model.model.embed_tokens(torch.randint(model.config.vocab_size, (*size, 4), generator=generator)).mean(-2)
    amount = (torch.rand(size, generator=generator) * 0.6 * chosen).unsqueeze(-1)
    mixed: Tensor = (1 - amount) * embeds + amount * noise
    return mixed


def train_reward(
    model: Qwen3ForSequenceClassification, tokenizer: Tokenizer, source: GradedTexts, settings: RewardTraining
) -> dict[str, float]:
    """Train in place on squared error. Returns figures for the model card."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.02)
    start = time.monotonic()
    step, smooth, progress = 0, 0.0, 0.0
    model.train()
    with tqdm(total=settings.steps, desc=f"reward {source.reward}", unit="step", mininterval=2.0) as bar:
        while progress < 1.0:
            rate = settings.learning_rate * min((step + 1) / settings.warmup, 1.0 - progress)
            optimizer.param_groups[0]["lr"] = rate
            wide = torch.rand(settings.batch, generator=generator) < 0.6
            gaps = torch.randint(64, (settings.batch,), generator=generator) * wide
            batch = encode([source.draw() for _ in range(settings.batch)], tokenizer, gaps)
            loss = functional.mse_loss(rewards(model, batch, blended(model, batch, generator)), batch.grades)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            step += 1
            smooth += (loss.item() - smooth) * max(0.02, 1.0 / step)
            minutes = (time.monotonic() - start) / 60
            progress = max(step / settings.steps, minutes / settings.minutes)
            bar.update()
            bar.set_postfix(mse=f"{smooth:.3f}", minutes=f"{minutes:.1f}", refresh=False)
    model.eval()
    return {"steps": step, "minutes": round((time.monotonic() - start) / 60, 1), "train_mse": round(smooth, 4)}


@torch.no_grad()
def correlation(model: Qwen3ForSequenceClassification, tokenizer: Tokenizer, texts: list[Graded]) -> float:
    """Pearson correlation of the model's rewards with the texts' grades."""
    found = [
        rewards(model, encode(part, tokenizer, torch.zeros(len(part), dtype=torch.long)))
        for part in (texts[i : i + 64] for i in range(0, len(texts), 64))
    ]
    both = torch.stack([torch.cat(found), torch.tensor([text.grade for text in texts])])
    return float(torch.corrcoef(both)[0, 1])
