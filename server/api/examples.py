"""Example requests of the OpenAPI document: they need no name of a model, and work on every server with a reward
model."""

from __future__ import annotations

from typing import Any

Examples = dict[str, dict[str, Any]]

_MESSAGES = [{"role": "user", "content": "Write a short review of a film."}]

EXAMPLES: dict[str, Examples] = {
    "CompletionRequest": {
        "Continue a text": {"prompt": "The film was", "max_tokens": 16},
        "Fill in between": {"prompt": "The film was", "suffix": "I can recommend it.", "max_tokens": 12, "seed": 7},
    },
    "ChatCompletionRequest": {
        "Answer": {"messages": _MESSAGES, "max_tokens": 16},
        "Guided by a reward": {
            "messages": _MESSAGES,
            "max_tokens": 16,
            "best_of": 4,
            "guidance": {"method": "entrgi", "gradient_steps": 3, "eta": 0.5},
            "diffusion": {"steps": 8, "algorithm": "entropy"},
        },
        "Streamed with its canvas": {
            "messages": _MESSAGES,
            "max_tokens": 16,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stream_canvas": True,
        },
    },
    "ScoreRequest": {
        "One prompt, two answers": {
            "queries": "Write a short review of a film.",
            "documents": ["It was very good.", "It was very bad."],
        }
    },
    "RerankRequest": {
        "The better answer": {
            "query": "Write a short review of a film.",
            "documents": ["It was very bad.", "It was very good."],
            "top_n": 1,
        }
    },
    "TokenizeRequest": {
        "A text": {"prompt": "The film was", "return_token_strs": True},
        "A conversation": {"messages": _MESSAGES},
    },
    "DetokenizeRequest": {"Three tokens": {"tokens": [5, 6, 7]}},
}
"""By request schema, then by title."""
