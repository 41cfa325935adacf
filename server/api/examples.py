"""Example requests of the OpenAPI document: they need no name of a model, and work on every server with a reward
model."""

from __future__ import annotations

from typing import Any

_REVIEW = "Write a short review of a film."
_CHAT = {"messages": [{"role": "user", "content": _REVIEW}], "max_tokens": 16}
_ENTRGI = {"method": "entrgi", "gradient_steps": 3, "eta": 0.5}

EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "CompletionRequest": {
        "Continue a text": {"prompt": "The film was", "max_tokens": 16},
        "Fill in between": {"prompt": "The film was", "suffix": "I can recommend it.", "max_tokens": 12, "seed": 7},
    },
    "ChatCompletionRequest": {
        "Answer": _CHAT,
        "Guided by a reward": {**_CHAT, "best_of": 4, "guidance": _ENTRGI, "diffusion": {"steps": 8}},
        "Resampled by a reward": {**_CHAT, "best_of": 4, "guidance": "smc"},
        "Streamed with its canvas": {
            **_CHAT, "stream": True, "stream_options": {"include_usage": True}, "stream_canvas": True,
        },
    },
    "ResponsesRequest": {
        "Answer": {"input": _REVIEW, "instructions": "Be brief.", "max_output_tokens": 16},
        "Guided by a reward": {"input": _REVIEW, "max_output_tokens": 16, "guidance": _ENTRGI, "stream": True},
    },
    "ScoreRequest": {"Two answers": {"queries": _REVIEW, "documents": ["It was very good.", "It was very bad."]}},
    "RerankRequest": {"The better": {"query": _REVIEW, "documents": ["It was bad.", "It was good."], "top_n": 1}},
    "TokenizeRequest": {
        "A text": {"prompt": "The film was", "return_token_strs": True},
        "A conversation": {"messages": _CHAT["messages"]},
    },
    "DetokenizeRequest": {"Three tokens": {"tokens": [5, 6, 7]}},
    "CreateBatchRequest": {
        "Chats": {
            "input_file_id": "file-0123456789abcdef01234567", "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    },
    "LoadAdapterRequest": {
        "A new one": {"lora_name": "policy", "lora_path": "policy/step-1"},
        "The next version": {"lora_name": "policy", "lora_path": "policy/step-2", "load_inplace": True},
    },
    "UnloadAdapterRequest": {"One": {"lora_name": "policy"}},
}  # fmt: skip
"""By request schema, then by title."""
