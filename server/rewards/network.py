"""A published sequence classifier as transformers builds it: checked, frozen, and running on our attention.

Only what R needs is accepted: one label, plain causal attention in every layer, weights in safetensors, and code that
transformers itself has. Anything else is refused at start-up, by the name of the key, rather than read wrongly later.
An adapter (`models.lora`) is added to the weights of its base here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from server.errors import ConfigurationError, quote
from server.models.layers import compute_dtype
from server.models.lora import read_weights
from server.models.weights import stored_tensors
from server.rewards.attention import ATTENTION_NAME
from server.text.tokenizer import Tokenizer

HEAD = "score.weight"


def check_config(config: Mapping[str, Any], *, headless: bool = False) -> None:
    """Refuse a config.json that is no reward model's; `headless`: nor the base of one, whose head an adapter brings.
    Raises ConfigurationError, which names the key."""
    architectures = config.get("architectures") or []
    if not headless and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise ConfigurationError(f"architectures: {quote(architectures)} is no sequence classifier, so no reward model")
    labels = config.get("id2label")
    count = len(labels) if labels else config.get("num_labels")
    if count not in (None, 1):
        raise ConfigurationError(f"num_labels: a reward model has 1 label, this one {quote(count)}")
    text = config.get("text_config") or config
    pad, size = text.get("pad_token_id"), text.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ConfigurationError(f"pad_token_id: {pad} is outside the vocabulary, whose vocab_size is {size}")


def check_tokens(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with a token that has no row in the embeddings, of `rows` rows: a message may contain it."""
    token, index = max(tokenizer.vocab().items(), key=lambda entry: entry[1])
    if index >= rows:
        raise ConfigurationError(
            f"vocab_size: the tokenizer's token {quote(token)} has id {index}, the embeddings only {rows} rows: "
            "they do not belong together"
        )


def load_network(folder: Path, *, dtype: torch.dtype, device: torch.device, adapter: Path | None = None) -> Any:
    """The transformers module of a local checkpoint, frozen, in evaluation mode, in `dtype` on `device`, with an
    adapter's folder merged into it.

    Its score head is kept in float32 at least: in bfloat16 a reward of 5 would come in steps of 0.03. Raises
    ConfigurationError.
    """
    head = stored_tensors(folder).get(HEAD)
    if head is not None and head.shape[0] != 1:
        raise ConfigurationError(f"num_labels: a reward model has 1 label, {HEAD} has {head.shape[0]} rows")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, num_labels=1)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigurationError(f"config.json: {_first_line(error)}") from error
    _check_attention(config)
    try:
        network, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigurationError(f"{folder.name}: the weights cannot be loaded: {_first_line(error)}") from error
    if not network._supports_attention_backend or not isinstance(getattr(network, "score", None), torch.nn.Module):
        raise ConfigurationError(f"architectures: {type(network).__name__} cannot run with packed attention")
    network.eval().requires_grad_(False).to(device)
    if dtype.itemsize < torch.float32.itemsize:
        network.score.to(torch.float32)
    merged = () if adapter is None else _merge(network, adapter)
    if missing := sorted(set(report["missing_keys"]).difference(merged)):  # transformers fills them with random numbers
        raise ConfigurationError(f"{folder.name}: the checkpoint lacks {len(missing)} weights, first {missing[0]}")
    return network


def _merge(network: Any, adapter: Path) -> tuple[str, ...]:
    """Add an adapter's products to the weights, computed in float32 at least. Returns the names of weights that the
    adapter holds whole."""
    embeddings, score = network.get_input_embeddings(), network.score
    modules = {name: module for name, module in network.named_modules() if not name.startswith("score")}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    closed = ["score", *(name for name, module in modules.items() if module is embeddings)]
    wide, head = compute_dtype(network.dtype), score if isinstance(score, nn.Linear) else None
    factors, saved = read_weights(adapter, linear, closed, wide, embeddings.weight.device, head=head)
    for module, (down, up) in factors.items():
        merged = (module.weight.to(wide) + up @ down).to(module.weight.dtype)
        module.weight = nn.Parameter(merged, requires_grad=False)
    if saved is None:
        return ()
    score.weight = nn.Parameter(saved.to(score.weight.dtype), requires_grad=False)
    return (HEAD,)


def _check_attention(config: Any) -> None:
    """Refuse attention that is not plainly causal over the whole context."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigurationError(f"layer_types: only full_attention is supported, not {', '.join(sorted(kinds))}")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise ConfigurationError(f"sliding_window: attention with a window ({window} tokens) is not supported")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ConfigurationError("attn_logit_softcapping: soft-capped attention is not supported")


def _first_line(error: Exception) -> str:
    return quote(str(error).strip().partition("\n")[0] or type(error).__name__)
