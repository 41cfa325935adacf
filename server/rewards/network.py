"""A published sequence classifier as transformers builds it: checked, frozen, and running on our attention.

Only what R needs is accepted: plain causal attention in every layer, weights in safetensors, and code that transformers
itself has. Anything else is refused at start-up, by the name of the key, rather than read wrongly later.
An adapter (`models.lora`) is added to the weights of its base here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from server.errors import ConfigurationError, quote
from server.models.layers import compute_dtype
from server.models.lora import read_weights
from server.rewards.attention import ATTENTION_NAME
from server.rewards.classifier import HEAD, Classifier


def check_tokens(vocabulary: Mapping[str, int], rows: int) -> None:
    """Refuse a vocabulary with a token that has no row in the embeddings, of `rows` rows: a message may contain it."""
    token, index = max(vocabulary.items(), key=lambda entry: entry[1])
    if index >= rows:
        raise ConfigurationError(
            f"vocab_size: the tokenizer's token {quote(token)} has id {index}, the embeddings only {rows} rows: "
            "they do not belong together"
        )


def load_network(
    found: Classifier, *, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> tuple[Any, set[str]]:
    """The transformers module of a local checkpoint, frozen, in evaluation mode, in `dtype` on `device`, and the names
    of the weights that the checkpoint lacks. `attention` is an implementation of attention that replaces transformers'
    choice. Raises ConfigurationError."""
    folder = found.folder
    trusted: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=found.labels, **trusted)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigurationError(f"config.json: {first_line(error)}") from error
    if attention is not None:
        _check_attention(config)
    try:
        network, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=found.adapter is not None,  # its head may be of another size
            output_loading_info=True,
            **trusted,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigurationError(f"{folder.name}: the weights cannot be loaded: {first_line(error)}") from error
    network.eval().requires_grad_(False).to(device)
    return network, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def load_causal(found: Classifier, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal model on our attention, with an adapter's folder merged into it.

    Its score head is kept in float32 at least: in bfloat16 a reward of 5 would come in steps of 0.03. Raises
    ConfigurationError.
    """
    network, missing = load_network(found, dtype=dtype, device=device, attention=ATTENTION_NAME)
    if not network._supports_attention_backend or not isinstance(getattr(network, "score", None), torch.nn.Module):
        raise ConfigurationError(f"architectures: {type(network).__name__} cannot run with packed attention")
    if dtype.itemsize < torch.float32.itemsize:
        network.score.to(torch.float32)
    check_complete(found, missing.difference(() if found.adapter is None else _merge(network, found.adapter)))
    return network


def check_complete(found: Classifier, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them with random numbers."""
    if missing:
        raise ConfigurationError(
            f"{found.folder.name}: the checkpoint lacks {len(missing)} weights, first {min(missing)}"
        )


def positions_of(config: Any) -> int | None:
    """How many tokens a transformers configuration says that its model was made for; None where it says nothing."""
    try:
        declared: int | None = getattr(config, "max_position_embeddings", None)
    except NotImplementedError:  # as XLNet's says that it has no limit
        return None
    return declared


def learned_positions(network: Any) -> int | None:
    """How many tokens a module can read, which has a learned embedding for each position; None where rotations or
    distances stand for positions, since these have no end."""
    declared = positions_of(network.config.get_text_config())
    if declared is None:
        return None
    tokens = network.get_input_embeddings().weight
    tables = [each for each in network.modules() if isinstance(each, nn.Embedding) and each.weight is not tokens]
    tables = [each for each in tables if len(each.weight) >= declared]
    # RoBERTa counts positions from the one after its padding's on.
    unused = max((-1 if each.padding_idx is None else each.padding_idx for each in tables), default=-1)
    return declared - unused - 1 if tables else None


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


def first_line(error: Exception) -> str:
    """What an error of a library says first."""
    return quote(str(error).strip().partition("\n")[0] or type(error).__name__)
