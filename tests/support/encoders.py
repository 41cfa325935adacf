"""Small random encoders in the layouts of published ones, and transformers' own pipeline over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    TextClassificationPipeline,
)

MOODS = {0: "negative", 1: "neutral", 2: "positive"}
LENGTH = 64
"""Tokens that these encoders read at most."""

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
    "id2label": MOODS,
    "pad_token_id": 0,
}
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
MODERN = {"local_attention": 8, "bos_token_id": None, "eos_token_id": None, "cls_token_id": 2, "sep_token_id": 3}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3, "bos_token_id": 2, "eos_token_id": 3,
    "decoder_start_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertConfig, BertForSequenceClassification, {}),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, {"max_position_embeddings": LENGTH + 1}),
    "deberta-v2": (DebertaV2Config, DebertaV2ForSequenceClassification, DEBERTA_V3),
    "modernbert": (ModernBertConfig, ModernBertForSequenceClassification, MODERN),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification, {}),
    "bart": (BartConfig, BartForSequenceClassification, BART),  # which no list of ours names
}
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT = ["the quick brown fox jumps over the lazy dog", "This is a licence notice; it is GOOD, terrible or great!"]


def write_encoder(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A random checkpoint of a family with a tokenizer of its kind, in the published layout: BERT's is the older one,
    whose words are in a text file."""
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(1)
    model_class(config_class(**{**SMALL, **own, **changes})).save_pretrained(folder)
    if family in ("bert", "distilbert"):
        words = [*SPECIALS, *_words().get_vocab().keys() - set(SPECIALS)]
        (folder / "vocab.txt").write_text("\n".join(words[:5] + sorted(words[5:])))
        told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    else:
        _bytes(types=family == "deberta-v2").save_pretrained(folder)
    return folder


def pipeline(folder: Path, dtype: torch.dtype = torch.float64) -> TextClassificationPipeline:
    """transformers' own, which gives the logits of all labels in their order."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return TextClassificationPipeline(
        model=model.eval(), tokenizer=AutoTokenizer.from_pretrained(folder), function_to_apply="none", top_k=None
    )


def logits_of(stock: TextClassificationPipeline, text: str, pair: str | None = None) -> torch.Tensor:
    """The pipeline's logits (C,) of one text or two."""
    given = {"text": text} if pair is None else {"text": text, "text_pair": pair}
    scores = {each["label"]: each["score"] for each in stock(given)}
    return torch.tensor([scores[name] for name in stock.model.config.id2label.values()], dtype=torch.float64)


def _words() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(SPECIALS)))
    return made


def _bytes(*, types: bool) -> PreTrainedTokenizerFast:
    """Byte pairs between special tokens, with a type for each of two texts or without."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    second = 1 if types else 0
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)
