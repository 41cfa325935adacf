"""GuideLLM: short load runs with synthetic prompts, counted with the served model's tokenizer from its folder."""

from __future__ import annotations

import json
import os
from typing import Any

from checks import KEY, MODEL, OUT, URL, check, equal, main, run, true

TOKENIZER = os.environ["CONFORMANCE_TOKENIZER"]
REQUESTS = 8
OUTPUT_TOKENS = 12


def load(route: str, profile: str, extra: str = "") -> list[dict[str, Any]]:
    """A run of `REQUESTS` requests; each of them as GuideLLM reports it."""
    report = OUT / "report.json"
    report.unlink(missing_ok=True)
    done = run(
        *("guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={URL},model={MODEL},api_key={KEY},request_format={route}{extra}"),
        *("--profile", profile, "--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={OUTPUT_TOKENS}"),
        *("--output", f"kind=json,path={report}"),
    )
    equal(done.returncode, 0)
    (benchmark,) = json.loads(report.read_text("utf-8"))["benchmarks"]
    requests = benchmark["requests"]
    equal((len(requests["successful"]), len(requests["errored"]), len(requests["incomplete"])), (REQUESTS, 0, 0))
    true(all(each["output"] for each in requests["successful"]))
    # It asks with ignore_eos, so that every answer has the length it wants to measure.
    equal({each["output_metrics"]["text_tokens"] for each in requests["successful"]}, {OUTPUT_TOKENS})
    return list(requests["successful"])


@check
def chat() -> None:
    """chat: streams at concurrency 2, usage in every chunk, ignore_eos"""
    requests = load("/v1/chat/completions", "kind=concurrent,streams=2")
    true(all(each["info"]["timings"]["token_iterations"] for each in requests))


@check
def completions() -> None:
    """completions: streams one after another"""
    load("/v1/completions", "kind=synchronous")


@check
def whole() -> None:
    """chat: answers that are not streamed, all at once"""
    load("/v1/chat/completions", f"kind=throughput,max_concurrency={REQUESTS}", ",stream=false")


main("guidellm")
