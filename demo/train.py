"""Train everything that is bundled: `python -m demo.train`.

Tokenizers, the diffusion LM, the reward models, the figures of the model card. Seeded; at most about 90 minutes on
two cores with the defaults. Needs no network but for the human-rated snippets (one download with pip), without which
it says so and goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForSequenceClassification

from demo import MODELS
from demo.checkpoint import save_dlm, save_reward
from demo.corpus import Corpus
from demo.human_ratings import RatedSnippet, load_or_warn
from demo.rewards_data import GradedTexts
from demo.tokenizer import MASK, build_tokenizers, token_id
from demo.train_dlm import DlmTraining, initialise, train_dlm
from demo.train_rewards import (
    VALIDATION_SEED,
    RewardTraining,
    correlation,
    reward_config,
    train_reward,
)
from server.models.dream import DreamModel
from server.models.layers import DecoderConfig

TOKENIZER_SAMPLE = 15_000  # examples of each form
VOCABULARY_MULTIPLE = 64  # embedding rows are padded up, as in the published checkpoints
HELD_OUT_SNIPPETS = 10  # one snippet in so many is kept from training
FIGURES = "figures.json"

log = logging.getLogger("demo.train")


def learn_tokenizers(seed: int) -> tuple[Tokenizer, Tokenizer]:
    """(diffusion, reward) tokenizers from a sample of the corpus and the chat template's words."""
    corpus = Corpus(seed)
    texts: list[str] = ["user\n", "assistant\n", "system\n"] * 500
    for form in ("chat", "raw", "continuation"):
        for _ in range(TOKENIZER_SAMPLE):
            example = corpus.draw(form)
            texts += [example.prompt, example.answer, example.system or ""]
    return build_tokenizers(texts)


def make_dlm(tokenizer: Tokenizer, seed: int) -> DreamModel:
    """A fresh Dream-shaped model of 1.4 M parameters."""
    rows = -(-tokenizer.get_vocab_size() // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model = DreamModel(
        DecoderConfig(
            vocab_size=rows,
            hidden=128,
            intermediate=384,
            heads=4,
            key_heads=2,
            head_size=32,
            layers=5,
            mask_token_id=token_id(tokenizer, MASK),
        )
    )
    initialise(model, seed)
    return model


def make_rewards(
    tokenizer: Tokenizer, folder: Path, settings: RewardTraining, ratings: list[RatedSnippet]
) -> dict[str, Any]:
    """Train and save the reward models. Returns their figures."""
    held_out = ratings[::HELD_OUT_SNIPPETS]
    kept = [snippet for index, snippet in enumerate(ratings) if index % HELD_OUT_SNIPPETS]
    figures: dict[str, Any] = {}
    for name, snippets in (("sentiment", kept), ("concrete", [])):
        torch.manual_seed(settings.seed)
        model = Qwen3ForSequenceClassification(reward_config(tokenizer))
        found: dict[str, Any] = train_reward(model, tokenizer, GradedTexts(name, settings.seed, snippets), settings)
        shutil.rmtree(folder / name, ignore_errors=True)
        found["parameters"] = save_reward(model, tokenizer, folder / name)
        judged = GradedTexts(name, VALIDATION_SEED)
        found["correlation_clean"] = round(correlation(model, tokenizer, [judged.clean() for _ in range(1024)]), 4)
        found["correlation_spoiled"] = round(correlation(model, tokenizer, [judged.spoiled() for _ in range(1024)]), 4)
        if snippets:
            rated = [judged.from_snippet(snippet) for snippet in held_out]
            found["correlation_human"] = round(correlation(model, tokenizer, rated), 4)
            found["human_rated_snippets"] = len(snippets)
        log.info("%s: %s", name, found)
        figures[name] = found
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS, help="where the checkpoints go (default: the bundled ones)")
    parser.add_argument("--only", choices=("dlm", "rewards"), help="train one part and leave the other as it is")
    parser.add_argument("--dlm-steps", type=int, default=DlmTraining.steps)
    parser.add_argument("--dlm-minutes", type=float, default=DlmTraining.minutes, help="cap; the schedule adapts")
    parser.add_argument("--reward-steps", type=int, default=RewardTraining.steps)
    parser.add_argument("--reward-minutes", type=float, default=RewardTraining.minutes, help="cap for each model")
    parser.add_argument("--ratings", type=Path, help="folder that holds, or shall hold, the human ratings' archive")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)  # parallelism is across batches, see train_dlm

    diffusion_tokenizer, reward_tokenizer = learn_tokenizers(options.seed)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    figures_path = out / FIGURES
    figures: dict[str, Any] = json.loads(figures_path.read_text("utf-8")) if figures_path.exists() else {}
    if options.only != "rewards":
        model = make_dlm(diffusion_tokenizer, options.seed)
        settings = DlmTraining(steps=options.dlm_steps, minutes=options.dlm_minutes, seed=options.seed)
        found: dict[str, Any] = train_dlm(model, diffusion_tokenizer, settings)
        shutil.rmtree(out / "dlm", ignore_errors=True)
        found["parameters"] = save_dlm(model, diffusion_tokenizer, out / "dlm")
        log.info("diffusion LM: %s", found)
        figures["dlm"] = found
    if options.only != "dlm":
        rewards = RewardTraining(steps=options.reward_steps, minutes=options.reward_minutes, seed=options.seed + 10)
        figures["rewards"] = make_rewards(reward_tokenizer, out / "rewards", rewards, load_or_warn(options.ratings))
    figures_path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
