"""Train the bundled diffusion LM: masked cross-entropy on the instruction corpus.

The model is `server.models.dream.DreamModel` itself, so what is trained is what is served. Loss: cross-entropy at
masked canvas positions, averaged within a sequence and then over sequences. With the masked share t uniform this is
the usual 1/t-weighted bound of masked diffusion (LLaDA, Dream) up to a constant factor.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from demo.batches import Batch, BatchMaker
from demo.corpus import Corpus
from demo.muon import Muon
from server.models.dream import DreamModel
from server.models.packing import PackedLayout

WORKERS = 2  # batches a step, each in its own thread
VALIDATION_BATCHES = 16
VALIDATION_SEED = 90_001  # far from any training seed


INITIAL_STD = 0.02


@dataclass(frozen=True)
class DlmTraining:
    """Settings. `minutes` caps the wall time: the learning rate then reaches zero at the cap."""

    steps: int = 8000
    minutes: float = 60.0
    learning_rate: float = 3e-3  # AdamW
    muon_rate: float = 6e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 1


def initialise(model: torch.nn.Module, seed: int, std: float = INITIAL_STD) -> None:
    """Fresh weights: matrices normal with `std`, norms one, biases zero. Seeded on the weights' device."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)


def masked_loss(model: DreamModel, batch: Batch) -> Tensor:
    """Weighted cross-entropy at the masked rows, a scalar in nats."""
    layout = PackedLayout.of(batch.lengths, batch.tokens.device)
    logits = model.masked_logits(batch.tokens, layout, batch.rows)
    losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.weights).sum()


@torch.no_grad()
def validation_loss(model: DreamModel, tokenizer: Tokenizer) -> float:
    """Mean `masked_loss` on fixed batches that training never draws."""
    maker = BatchMaker(Corpus(VALIDATION_SEED), tokenizer, VALIDATION_SEED)
    return sum(masked_loss(model, maker.next()).item() for _ in range(VALIDATION_BATCHES)) / VALIDATION_BATCHES


def gradients(model: DreamModel, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
    """The loss of one batch and its gradients with respect to all parameters, in their order."""
    loss = masked_loss(model, batch)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


class Optimizer:
    """Muon for the blocks' matrices, AdamW for embeddings, head, norms and biases."""

    def __init__(self, model: DreamModel, settings: DlmTraining) -> None:
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.settings = settings
        self.muon = Muon(matrices, momentum=0.95, weight_decay=settings.weight_decay)
        self.adamw = torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, scale: float) -> None:
        """One update with both learning rates multiplied by `scale`."""
        self.muon.step(self.settings.muon_rate * scale)
        self.adamw.param_groups[0]["lr"] = self.settings.learning_rate * scale
        self.adamw.step()


def train_dlm(model: DreamModel, tokenizer: Tokenizer, settings: DlmTraining) -> dict[str, float]:
    """Train in place. Returns figures for the model card: steps, minutes, tokens, losses in nats.

    Every step takes two batches, each in a thread of its own on one core: on a machine with other work to do this
    is several times faster than splitting every single operation over both cores.
    """
    maker = BatchMaker(Corpus(settings.seed), tokenizer, settings.seed)
    parameters = list(model.parameters())
    optimizer = Optimizer(model, settings)
    start = time.monotonic()
    step, tokens, smooth, progress = 0, 0, 0.0, 0.0
    with (
        tqdm(total=settings.steps, desc="diffusion LM", unit="step", mininterval=2.0) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        while progress < 1.0:
            scale = min((step + 1) / settings.warmup, 1.0 - progress)
            batches = [maker.next() for _ in range(WORKERS)]
            results = list(pool.map(gradients, [model] * WORKERS, batches))
            for parameter, *parts in zip(parameters, *(found for _, found in results), strict=True):
                parameter.grad = torch.stack(parts).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step(scale)
            step += 1
            tokens += sum(len(batch.tokens) for batch in batches)
            loss = sum(loss for loss, _ in results) / WORKERS
            smooth += (loss - smooth) * max(0.02, 1.0 / step)
            minutes = (time.monotonic() - start) / 60
            progress = max(step / settings.steps, minutes / settings.minutes)
            bar.update()
            bar.set_postfix(loss=f"{smooth:.3f}", minutes=f"{minutes:.1f}", refresh=False)
    return {
        "steps": step,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "tokens": tokens,
        "train_loss": round(smooth, 4),
        "validation_loss": round(validation_loss(model, tokenizer), 4),
    }
