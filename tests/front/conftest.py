"""What the tests of this folder may ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.front.scripted import Driven, running


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Driven]:
    """One scripted worker and no spare one."""
    async with running() as engine:
        yield engine
