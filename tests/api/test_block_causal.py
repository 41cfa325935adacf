"""Block-causal models over HTTP: the published samplers' runs come back, one at a time and sixteen at a time;
`/v1/models`, and what such a model cannot do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.api.scripted_engine import check_envelope
from tests.support.serving import GOLDEN, Launch, Served, golden_flags


@pytest.fixture(scope="module", params=["bd3lm-tiny", "sdar-tiny"])
def blocks(request: pytest.FixtureRequest, launch: Launch) -> tuple[Served, str]:
    """A server on each of the golden block-causal models, and its name. BD3LM's has to be told."""
    name = str(request.param)
    server = launch(*golden_flags(name), model=None)
    server.wait_ready()
    return server, name


@pytest.mark.parametrize("concurrency", ["1", "16"])
def test_recorded_runs(blocks: tuple[Served, str], concurrency: str) -> None:
    server, name = blocks
    command = [sys.executable, str(GOLDEN / "run_golden.py"), "--cases", str(GOLDEN / name / "trajectories.json")]
    command += ["--base-url", server.url, "--concurrency", concurrency, "--reward-model", "rm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "24 passed, 0 failed"


def test_the_model_says_what_it_is(blocks: tuple[Served, str]) -> None:
    server, name = blocks
    model = server.client.get("/v1/models").json()["data"][0]
    assert model["attention"] == "block_causal"
    defaults = model["defaults"]
    assert (defaults["schedule"], defaults["block_length"]) == ("even", 32 if name == "bd3lm-tiny" else 4)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("diffusion.cfg_scale", {"diffusion": {"cfg_scale": 0.5}}),
        ("suffix", {"suffix": "and so on"}),
        ("diffusion.block_length", {"diffusion": {"block_length": 0}}),
        ("prompt", {"max_tokens": 2047}),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(blocks: tuple[Served, str], field: str, body: dict[str, object]) -> None:
    response = blocks[0].post("/v1/completions", {"prompt": "Hi", **body})
    assert check_envelope(response, 400)["param"] == field
