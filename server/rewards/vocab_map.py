"""Which reward-model token each diffusion-model token is (algorithm, section 2).

The map turns the reward model's embeddings into a table E (V, D) that the diffusion vocabulary can index.

Tokens are matched by their vocabulary *string*. Ids that agree prove nothing: Dream uses ids 151665 and 151666 for its
own begin and mask tokens, where Qwen3 has other tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from server.errors import ConfigurationError
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VocabFallback = Literal["unk", "zero"]


@dataclass(frozen=True, slots=True)
class VocabMap:
    """For each of V diffusion ids the reward id of the same string, or the fallback.

    `ids[i]` is a reward id; where `known[i]` is False it is the fallback's: the reward tokenizer's unknown token, else
    its EOS, or -1 for a zero vector (`zero`). `coverage` is the share of the diffusion tokenizer's tokens that the
    reward vocabulary knows (rows past the tokenizer's end, which pad the logits, do not count).
    """

    ids: tuple[int, ...]
    known: tuple[bool, ...]
    coverage: float


def map_vocabulary(
    name: str,
    diffusion: Tokenizer,
    reward: Tokenizer,
    diffusion_vocab_size: int,
    fallback: VocabFallback = "unk",
) -> VocabMap:
    """Map V = `diffusion_vocab_size` ids onto the vocabulary of reward model `name`; the coverage is logged.

    ConfigurationError when `unk` has no token to fall back on, or a diffusion token lies outside the logits.
    """
    if fallback == "zero":
        fallback_id = -1
    else:
        token = reward.unk_token_id if reward.unk_token_id is not None else reward.eos_token_id
        if token is None:
            raise ConfigurationError(
                "vocab_fallback: the reward model's tokenizer has neither an unknown nor an EOS token; use zero"
            )
        fallback_id = token
    entries = diffusion.vocab()
    last = max(entries.values(), default=-1)
    if last >= diffusion_vocab_size:
        raise ConfigurationError(
            f"the diffusion tokenizer has id {last}, past the {diffusion_vocab_size} rows of the model's vocab_size"
        )
    ids = [fallback_id] * diffusion_vocab_size
    known = [False] * diffusion_vocab_size
    vocabulary = reward.vocab()
    for string, index in entries.items():
        reward_id = vocabulary.get(string)
        if reward_id is not None:
            ids[index] = reward_id
            known[index] = True
    coverage = sum(known) / max(len(entries), 1)
    missing = [string for string, index in entries.items() if not known[index]]
    logger.info(
        "reward model %s knows %d of %d tokens of the diffusion vocabulary (%.2f%%); the others, %s..., read as %s",
        name,
        sum(known),
        len(entries),
        100 * coverage,
        missing[:5],
        "a zero vector" if fallback_id < 0 else repr(reward.token_string(fallback_id)),
    )
    return VocabMap(tuple(ids), tuple(known), coverage)
