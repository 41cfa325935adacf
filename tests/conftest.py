"""What any test may ask for: a server of its own, the one that all share, exact norms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.serving import GOLDEN, QUICK, Launch, Served, golden_flags, start

# No verdict may hang on how fast or how busy the machine is.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts servers, by default on the golden Dream checkpoint without a reward model, and does not wait for them.
    All are stopped at the end."""
    started: list[Served] = []

    def begin(*flags: str, model: Path | None = GOLDEN / "dream-tiny" / "dlm") -> Served:
        where = () if model is None else ("--model", str(model), "--dtype", "float32")
        started.append(start(*QUICK, *where, *flags, log=tmp_path_factory.mktemp("server") / "log"))
        return started[-1]

    yield begin
    for each in started:
        each.stop()


@pytest.fixture(scope="session")
def server(launch: Launch) -> Served:
    """The server that tests share: golden Dream with both golden reward models, `rm` and `other`. Nobody stops it,
    kills its worker or leaves work in it."""
    served = launch(*golden_flags("dream-tiny", "llada-tiny"), model=None)
    served.wait_ready()
    return served


@pytest.fixture
def exact_qwen3_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's RMSNorm rounds to float32 even inside a float64 model; finite differences need all the digits."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Any) -> Any:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)
