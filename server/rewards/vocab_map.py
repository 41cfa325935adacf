"""Which reward-model token each diffusion-model token is (algorithm, section 2).

The map turns the reward model's embeddings into a table E (V, D) that the diffusion vocabulary can index.

Tokens are matched by their vocabulary *string*. Ids that agree prove nothing: Dream uses ids 151665 and 151666 for its
own begin and mask tokens, where Qwen3 has other tokens.
"""

from __future__ import annotations

import logging
from typing import Literal

from server.errors import ConfigurationError
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VocabFallback = Literal["unk", "zero"]


def map_vocabulary(
    name: str,
    diffusion: Tokenizer,
    reward: Tokenizer,
    diffusion_vocab_size: int,
    fallback: VocabFallback = "unk",
) -> tuple[list[int], float]:
    """For each of V = `diffusion_vocab_size` ids the id of the same string in the vocabulary of reward model `name`, or
    the fallback: its unknown token, else its EOS, or with `zero` -1, a zero vector.

    Beside that the coverage, which is logged too: the share of the diffusion tokenizer's tokens that the reward
    vocabulary knows (rows past the tokenizer's end, which pad the logits, do not count).

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
    vocabulary = reward.vocab()
    ids = [fallback_id] * diffusion_vocab_size
    for string, index in entries.items():
        ids[index] = vocabulary.get(string, fallback_id)
    missing = [string for string in entries if string not in vocabulary]
    coverage = 1 - len(missing) / max(len(entries), 1)
    logger.info(
        "reward model %s knows %d of %d tokens of the diffusion vocabulary (%.2f%%); the others, %s..., read as %s",
        name,
        len(entries) - len(missing),
        len(entries),
        100 * coverage,
        missing[:5],
        "a zero vector" if fallback_id < 0 else repr(reward.token_string(fallback_id)),
    )
    return ids, coverage
