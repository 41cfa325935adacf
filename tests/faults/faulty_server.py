"""`python -m tests.faults.faulty_server`: the server as it is, on workers that go wrong for certain seeds."""

from __future__ import annotations

import sys
from dataclasses import replace

from server import cli
from server.settings import Settings
from server.wire.config import EngineConfig
from tests.faults import faulty_worker

sound = cli.engine_config


def engine_config(settings: Settings) -> EngineConfig:
    """The settings' engine, with the faulty worker."""
    return replace(sound(settings), worker_command=faulty_worker.COMMAND)


if __name__ == "__main__":
    cli.engine_config = engine_config
    sys.exit(cli.main())
