"""lm-eval: a small generation task over completions and over chat completions.

Tasks that rank answers by their likelihood (multiple choice, perplexity) need prompt log-probabilities, which a masked
diffusion model does not have; the server refuses them by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from checks import KEY, MODEL, OUT, URL, check, equal, main, run, true

TASKS = Path(__file__).parent / "tasks"
LINES = [json.loads(line) for line in (TASKS / "reviews.jsonl").read_text("utf-8").splitlines()]


def evaluate(model: str, path: str, *flags: str, tokenizer: str = "tokenizer_backend=None") -> list[dict[str, Any]]:
    """Run the task; the samples it logged, in the task's order."""
    folder = OUT / f"{model}{len(flags)}"
    shutil.rmtree(folder, ignore_errors=True)
    done = run(
        *("lm-eval", "run", "--model", model, "--tasks", "reviews", "--include_path", str(TASKS)),
        *("--model_args", f"model={MODEL},base_url={URL}{path},num_concurrent=3,max_retries=1,{tokenizer}"),
        *("--output_path", str(folder), "--log_samples", *flags),
        folder=TASKS,  # the task names its data by a relative path
        OPENAI_API_KEY=KEY,
    )
    equal(done.returncode, 0)
    (results,) = folder.rglob("results_*.json")
    score = json.loads(results.read_text("utf-8"))["results"]["reviews"]["exact_match,none"]
    true(0 <= score <= 1, score)
    (samples,) = folder.rglob("samples_reviews_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    equal(len(lines), len(LINES))
    answers = [line["resps"][0][0] for line in lines]
    true(all(answers), answers)
    true(not any("!" in answer for answer in answers), answers)
    return sorted(lines, key=lambda line: line["doc_id"])


@check
def completions() -> None:
    """local-completions: generate_until with stop strings, three at a time, seeded"""
    first = evaluate("local-completions", "/v1/completions", "--seed", "7")
    again = evaluate("local-completions", "/v1/completions", "--seed", "7")
    equal([line["resps"] for line in first], [line["resps"] for line in again])


@check
def chat() -> None:
    """local-chat-completions: generate_until with the chat template"""
    evaluate("local-chat-completions", "/v1/chat/completions", "--apply_chat_template")


@check
def guided() -> None:
    """local-completions: guidance and diffusion by --gen_kwargs"""
    asked = {"guidance": "bon", "best_of": 2, "diffusion": {"steps": 8}, "max_gen_toks": 16}
    evaluate("local-completions", "/v1/completions", "--gen_kwargs", json.dumps(asked))


main("lm_eval")
