"""The command line, against a real HTTP server of the standard library that answers from a table."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clients.cli import main

Run = Callable[..., "Done"]
ROOT = Path(__file__).resolve().parents[2]

GUIDANCE = {
    "method": "entrgi",
    "reward_models": ["joy"],
    "seed": 7,
    "rewards": [[1.5, 0.25]],
    "steps": 4,
    "model_calls": 4,
    "reward_calls": 12,
    "queue_ms": 2.0,
    "generation_ms": 40.0,
}
CHOICE = {"index": 0, "text": "Lovely \x1b[31mstay.", "finish_reason": "stop", "reward": 1.5}
CHUNKS: list[dict[str, Any]] = [
    {"choices": [], "canvas": {"prompt": 0, "trajectory": 0, "step": 0, "tokens": ["Lovely", None]}},
    {"choices": [{"index": 0, "text": "Lovely "}]},
    {"choices": [{"index": 0, "text": "stay.", "finish_reason": "stop", "reward": 1.5}]},
    {"choices": [], "usage": {"completion_tokens": 2}, "guidance": GUIDANCE},
]


@dataclass
class Site:
    url: str
    bodies: list[Any] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    seen = Site("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [
                {"id": "demo", "type": "diffusion", "family": "dream", "max_model_len": 256},
                {"id": "joy", "type": "reward", "family": "qwen3", "max_model_len": 512},
            ]
            self.answer({"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.bodies.append(body)
            if self.path == "/v1/score":
                data = [{"index": i, "score": float(len(d))} for i, d in enumerate(body["documents"])]
                self.answer({"model": "joy", "data": data})
            elif body["prompt"] == "refuse":
                error = {"message": "no such method", "type": "t", "param": "guidance.method", "code": None}
                self.answer({"error": error}, status=400)
            elif body.get("stream"):
                self.stream()
            else:
                self.answer({"id": "c", "model": "demo", "choices": [CHOICE], "guidance": GUIDANCE})

        def answer(self, answer: object, status: int = 200) -> None:
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for data in [*(json.dumps(chunk) for chunk in CHUNKS), "[DONE]"]:
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(site: Site, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Done:
        code = main([*arguments, "--url", site.url])
        return Done(code, *capsys.readouterr())

    return call


def test_as_a_process(site: Site) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clients", "complete", "Hotel?", "--url", site.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Lovely")


def test_complete_prints_the_text_alone_to_standard_output(run: Run, site: Site) -> None:
    done = run(
        *("complete", "Hotel?", "--guidance", "entrgi", "--reward-model", "joy", "--best-of", "4", "--chat"),
        *("--steps", "4", "--temperature", "0.5"),
    )
    assert done.returncode == 0
    assert done.stdout == "Lovely \N{REPLACEMENT CHARACTER}[31mstay.\n"
    assert "reward 1.500" in done.stderr
    assert "1.50, 0.25" in done.stderr
    assert site.bodies == [
        {
            "prompt": "Hotel?",
            "best_of": 4,
            "temperature": 0.5,
            "guidance": {"method": "entrgi", "reward_model": "joy"},
            "diffusion": {"steps": 4},
            "chat_template": True,
        }
    ]


def test_inexact_options_are_sent_and_told(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUIDANCE, "approximations", ["entropy_bound", "guidance.every"])
    window = ["--guidance-start", "0.1", "--guidance-stop", "0.9", "--guidance-every", "2"]
    rule = ["--algorithm", "entropy_bound", "--entropy-bound", "0.5"]
    done = run("complete", "Hotel?", "--guidance", "entrgi", *window, *rule)
    assert "not exact: entropy_bound, guidance.every" in " ".join(done.stderr.split())
    run("complete", "Hotel?", "--algorithm", "threshold", "--confidence-threshold", "0.8")
    assert site.bodies == [
        {
            "prompt": "Hotel?",
            "guidance": {"method": "entrgi", "start": 0.1, "stop": 0.9, "every": 2},
            "diffusion": {"algorithm": "entropy_bound", "entropy_bound": 0.5},
        },
        {"prompt": "Hotel?", "diffusion": {"algorithm": "threshold", "confidence_threshold": 0.8}},
    ]
    assert "--guidance-every needs --guidance" in run("complete", "Hotel?", "--guidance-every", "2").stderr


def test_weighted_rewards(run: Run, site: Site) -> None:
    run("complete", "a", "--guidance", "aps", "--reward-model", "joy", "--reward-model", "a=b=0.5")
    assert site.bodies[0]["guidance"]["reward_models"] == [
        {"model": "joy", "weight": 1.0},
        {"model": "a=b", "weight": 0.5},
    ]


@pytest.mark.parametrize("flags", [["--stream"], ["--canvas"]])
def test_streams_give_the_same_text(run: Run, flags: list[str]) -> None:
    done = run("complete", "Hotel?", *flags)
    assert (done.returncode, done.stdout) == (0, "Lovely stay.\n")
    assert "entrgi, seed 7, 4 steps" in done.stderr


def test_json(run: Run, site: Site) -> None:
    done = run("complete", "Hotel?", "--json")
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["reward"] == 1.5
    assert answer["guidance"]["rewards"] == [[1.5, 0.25]]


def test_models_and_score(run: Run, site: Site) -> None:
    listed = run("models").stdout
    assert "demo" in listed
    assert "joy" in listed
    scored = run("score", "Hotel?", "Nice", "Terrible").stdout.splitlines()
    assert [line.split() for line in scored] == [["4.0000", "Nice"], ["8.0000", "Terrible"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["complete", "refuse"], "guidance.method"),
        (["complete", "a", "--eta", "1"], "--eta needs --guidance"),
        (["complete", "a", "--guidance", "aps", "--reward-model", "joy=much"], "weight"),
        (["loadgen", "--rate", "1", "--requests", "0"], "--requests"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(run: Run, arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_loadgen_ends_in_a_json_line(run: Run, site: Site) -> None:
    done = run("loadgen", "--rate", "200", "--requests", "20", "--stream", "--guidance", "entrgi")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["outcomes"] == {"ok": 20}
    assert set(report["latencies"]) == {"latency", "first text", "queue", "step", "late departure"}
    assert report["latencies"]["queue"]["p99"] == 0.002
    assert report["latencies"]["step"]["p50"] == 0.01
    assert sorted(body["seed"] for body in site.bodies) == list(range(20))
