"""Measures the Triton variants on this GPU and writes the dispatcher's table, kernels/gpu/choices.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import triton

import kernels
from benchmarks.kernels import compare, measure
from kernels.gpu import choices
from kernels.gpu.choices import Choice

ROWS = (128, 512, 2048)
HIDDEN = (256, 1024, 2048, 4096)
VOCAB_SIZE = 151_936
REPEATS = 10


def candidates() -> Iterator[Choice]:
    """The library variants, and the fused ones in the forms that `aot` shows to compile without spills."""
    yield Choice()
    for stages in (3, 4):
        for pieces in (2, 4):
            yield Choice(update="fused", update_stages=stages, update_pieces=pieces)
    yield Choice(forward="fused")


def time_choice(problem: compare.Problem, choice: Choice) -> tuple[float, float]:
    """Seconds of a mix and of an update with this choice."""
    with choices.forced(choice):
        figures = compare.measure_backend(problem, "triton", REPEATS).seconds
    return figures["mix"], figures["update"]


def tune(device: torch.device) -> dict[str, Any]:
    """Times every candidate for every shape, keeps the fastest forward and update of each, and writes the table."""
    rows, log = [], []
    for n in ROWS:
        for d in HIDDEN:
            shape = compare.Shape(n, VOCAB_SIZE, d, 3, torch.bfloat16, device)
            problem = compare.Problem(shape)
            best = Choice()
            fastest_mix, fastest_update = time_choice(problem, best)
            for candidate in candidates():
                mix, update = time_choice(problem, candidate)
                log.append({"N": n, "D": d, "choice": asdict(candidate), "mix": mix, "update": update})
                if candidate.forward == "fused" and mix < fastest_mix:
                    best, fastest_mix = replace(best, forward="fused"), mix
                if candidate.update == "fused" and update < fastest_update:
                    kept = {k: v for k, v in asdict(candidate).items() if k.startswith("update")}
                    best, fastest_update = replace(best, **kept), update
            rows.append(
                {
                    "capability": list(torch.cuda.get_device_capability(device)),
                    "dtype": "bfloat16",
                    "rows_at_most": n if n != ROWS[-1] else 1 << 30,
                    "hidden_at_most": d,
                    "choice": {k: v for k, v in asdict(best).items() if v != getattr(Choice(), k)},
                }
            )
            measure.synchronize(device)
    comment = (
        f"Measured on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}."
    )
    choices.TABLE.write_text(json.dumps({"comment": comment, "rows": rows}, indent=2) + "\n")
    choices.table.cache_clear()
    choices._look_up.cache_clear()
    return {"backends": kernels.backend_info(), "rows": rows, "measurements": log}
