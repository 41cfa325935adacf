"""The demo tokenizers: one byte-level BPE, in two orders.

The diffusion model's vocabulary is laid out as Dream's: bytes and merges first, special tokens after them. The
reward models' has the same merges but for the last few, its special tokens in front, no mask token, and everything
sorted by string. So the two agree on how text is cut and on hardly any id, as Dream and Qwen3 do, and the
vocabulary map by token string has real work to do, down to a handful of tokens that the reward side lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
MAX_VOCABULARY = 1700  # ordinary tokens
MIN_FREQUENCY = 40  # a merge that occurs less often in the sample is not worth a row
MISSING_MERGES = 8  # how many of the last merges the reward tokenizers lack


def chat_text(turns: Iterable[tuple[str, str]], add_generation_prompt: bool) -> str:
    """What CHAT_TEMPLATE renders for (role, content) turns."""
    text = "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)
    return text + (f"{IM_START}assistant\n" if add_generation_prompt else "")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there. Raises ValueError otherwise."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer lacks {token}")
    return found


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _learn(texts: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Ordinary tokens in the order in which they were learned (the 256 bytes first), and the merges."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=MAX_VOCABULARY,
            min_frequency=MIN_FREQUENCY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in model["merges"]]


def build_tokenizers(texts: Iterable[str]) -> tuple[Tokenizer, Tokenizer]:
    """Learn the BPE from the texts: (diffusion tokenizer, reward tokenizer)."""
    tokens, merges = _learn(texts)
    diffusion_vocab = {token: index for index, token in enumerate(tokens)}
    diffusion = _tokenizer(diffusion_vocab, merges, [END_OF_TEXT, IM_START, IM_END, MASK])

    kept = merges[:-MISSING_MERGES]
    missing = {left + right for left, right in merges[-MISSING_MERGES:]}
    ordered = [END_OF_TEXT, IM_START, IM_END, *sorted(token for token in tokens if token not in missing)]
    reward_vocab = {token: index for index, token in enumerate(ordered)}
    return diffusion, _tokenizer(reward_vocab, kept, [END_OF_TEXT, IM_START, IM_END])


def save_tokenizer(tokenizer: Tokenizer, folder: Path, eos: str, mask: str | None) -> None:
    """Write the four tokenizer files of a published checkpoint. Padding is done with <|endoftext|>."""
    folder.mkdir(parents=True, exist_ok=True)
    # One merge a line keeps the file diffable without making it long.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    special: dict[str, Any] = {
        "additional_special_tokens": [IM_START, IM_END],
        "eos_token": eos,
        "pad_token": END_OF_TEXT,
    }
    if mask is not None:
        special["mask_token"] = mask
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    settings = {
        "added_tokens_decoder": added,
        **special,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented, key-sorted JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
