"""The golden checkpoints with the plain loop over the same weights, for all families and in both precisions."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES, Pair, pair


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def pair64(family: str) -> Pair:
    return pair(family, torch.float64)


@pytest.fixture(scope="session")
def pair32(family: str) -> Pair:
    return pair(family, torch.float32)
