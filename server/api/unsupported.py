"""Why fields of OpenAI's and of other servers are refused, where clients may know them by name."""

from __future__ import annotations

_REASONS = {
    "a masked diffusion model has no left-to-right token probabilities": "echo logprobs top_logprobs prompt_logprobs",
    "tokens are not revealed from left to right, so there is no count to penalise": "frequency_penalty "
    "presence_penalty repetition_penalty",
    "the sampler has no such filter": "logit_bias min_p",
    "the canvas has max_tokens positions; use ignore_eos to have them all": "min_tokens",
    "a prompt is tokenised as it stands, and a conversation by its chat template": "add_special_tokens",
    "texts never hold special tokens; use return_token_ids to see them": "skip_special_tokens",
    "the model calls nothing, it only writes text": "tools tool_choice functions function_call max_tool_calls",
    "only text is generated": "response_format modalities audio prediction reasoning_effort verbosity reasoning "
    "include",
    "nothing is kept of a request once it is answered; send the whole conversation as `input`": "store "
    "previous_response_id conversation background",
    "a conversation that does not fit is refused, and never cut": "truncation",
    "a request never makes the server fetch anything": "web_search_options",
    "there is only one tier, and requests are taken in the order of their arrival": "service_tier priority",
    "texts are read whole, and what does not fit the reward model's context is refused": "max_chunks_per_doc "
    "max_tokens_per_doc max_tokens_per_query truncate_prompt_tokens",
    "a document is its `text` alone, and has one reward": "rank_fields relevant_spans",
    "a reward model reads a conversation; what it shall know belongs into `query`": "instruction",
}
WITHOUT_EFFECT = ("user", "store", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
"""Fields of OpenAI's that are taken as they are, since nothing could follow from them."""
UNSUPPORTED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Why a real value of a field is refused, by the last part of its path."""
