"""The life of the process: probes while loading, an orderly end under load, and a start that fails."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from tests.support.serving import Launch, Served

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SLOW: dict[str, Any] = {
    "prompt": "Tell me", "max_tokens": 48, "guidance": {"method": "entrgi", "gradient_steps": 8}, "best_of": 2,
}  # fmt: skip


def wait_for(condition: Any, seconds: float = 60) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def answers(served: Served, path: str) -> int | None:
    try:
        return served.client.get(path).status_code
    except httpx.TransportError:
        return None


def test_drain(launch: Launch) -> None:
    served = launch("--reward-model", str(GOLDEN / "dream-tiny" / "rm"), "--drain-seconds", "120")
    wait_for(lambda: answers(served, "/health") == 200)
    assert answers(served, "/ready") == 503  # the socket is bound before the models are loaded
    served.wait_ready()

    results: dict[str, Any] = {}

    def ask(name: str, **fields: Any) -> None:
        results[name] = httpx.post(f"{served.url}/v1/completions", json={**SLOW, **fields}, timeout=120)

    threads = [
        threading.Thread(target=ask, args=(name,), kwargs=fields)
        for name, fields in (("plain", {}), ("stream", {"stream": True}), ("second", {"seed": 1}))
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.metric("num_requests_running") == 3)
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: answers(served, "/ready") == 503)
    assert answers(served, "/health") == 200
    refused = served.post("/v1/completions", SLOW)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join(120)
    assert results["plain"].status_code == results["second"].status_code == 200
    assert results["plain"].json()["choices"][0]["text"]
    assert results["stream"].text.endswith("data: [DONE]\n\n")
    assert '"error"' not in results["stream"].text
    assert served.process.wait(60) == 0


def test_a_wrong_checkpoint_ends_the_process(launch: Launch, tmp_path: Path) -> None:
    served = launch(model=tmp_path)
    assert served.process.wait(120) == 1
    assert "could not be started" in served.log.read_text()
