"""Budgets from free memory: what is read from the system, what follows from it, and that it is an upper bound."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import astuple, fields, replace
from pathlib import Path

import pytest

from benchmarks.checkpoints import Shape, write_dream, write_llada, write_reward
from server.models.graphs import MOST_TOKENS
from server.wire.config import RewardSource, WorkerConfig
from server.worker import memory
from server.worker.memory import (
    CAPS,
    FIXED_BYTES,
    GRAPH_SHARE,
    LAST_CACHE_BYTES,
    LEAST,
    Footprint,
    free_bytes,
    last_cache_bytes,
)
from server.worker.service import load
from tests.support.models import CPU, GOLDEN, diffusion

ROOT = Path(__file__).parents[2]
FOOTPRINT = Footprint(
    token=3e5, hidden=7e3, logit_row=9e5, guided_row=2.4e6, phi_row=6e5, reward_token=1.3e6, cached_token=1.1e5,
    cached_share=1 / 8,
)  # fmt: skip


def machine(root: Path, cgroup: str, **files: str) -> Path:
    """A file system with 8 GiB available and these control groups, each as `file=value file=value`."""
    texts = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n", "proc/self/cgroup": cgroup}
    for folder, values in files.items():
        where = f"sys/fs/cgroup/{folder}"
        texts[f"{where}/memory.stat"] = "anon 1\ninactive_file 100\ntotal_inactive_file 200\n"
        texts |= {
            f"{where}/memory.{name}": f"{value}\n" for name, value in (each.split("=") for each in values.split())
        }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 8 << 30),  # no limit anywhere
        # v2: the tightest of the groups above, without what page cache would give up
        ("0::/a/b\n", {"a/b": "max=max current=500", "a": "max=4000 current=1000"}, 4000 - 1000 + 100),
        (  # v1, in a container: the path is the host's, the group's own files are at the mount
            "5:cpu:/docker/x\n4:memory:/docker/x\n0::/docker/x\n",
            {"memory": "limit_in_bytes=3000 usage_in_bytes=1000"},
            3000 - 1000 + 200,
        ),
        # v1 without a limit
        ("4:memory:/\n", {"memory": "limit_in_bytes=9223372036854771712 usage_in_bytes=1000"}, 8 << 30),
    ],
)
def test_free_memory_is_the_least_of_the_machines_and_its_groups(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    assert free_bytes(CPU, root=machine(tmp_path, cgroup, **files)) == expected


def test_budgets_grow_with_memory_up_to_the_caps_and_never_exceed_it() -> None:
    footprint, before = FOOTPRINT, None
    for gigabytes in (0, 1, 4, 16, 60, 10_000):
        shared, largest = footprint.budgets(gigabytes * 1e9, 0.8, "cuda", context_length=2048)
        for field in fields(shared):
            one, all_, cap = (getattr(b, field.name) for b in (shared, largest, CAPS["cuda"]))
            assert 1 <= one <= min(all_, cap)
            assert before is None or one >= getattr(before, field.name)
        if gigabytes > 1:
            taken = max(
                shared.tokens * footprint.token,
                shared.guided_rows * footprint.guided_row + shared.reward_tokens * footprint.reward_token,
                shared.logit_rows * footprint.logit_row,
            )
            kept = shared.cached_tokens * footprint.cached_token + shared.tokens * footprint.hidden
            assert taken + kept <= 0.8e9 * gigabytes
        before = shared
    assert before == CAPS["cuda"]


def test_what_graphs_hold_is_left_out_of_the_budgets() -> None:
    assert FOOTPRINT.graph_tokens(60e9, 0.8) == MOST_TOKENS
    held = FOOTPRINT.graph_tokens(8e9, 0.8)
    taken = held * FOOTPRINT.reward_token
    assert 0.99 < taken / (GRAPH_SHARE * (0.8 * 8e9 - FIXED_BYTES)) <= 1
    without, beside = (
        FOOTPRINT.budgets(free, 0.8, "cuda", context_length=2048, graph_tokens=tokens)[1]
        for free, tokens in ((8e9 - taken / 0.8, 0), (8e9, held))
    )
    assert all(abs(a - b) <= 1 for a, b in zip(astuple(beside), astuple(without), strict=True))


def test_a_block_causal_model_has_half_of_the_memory_for_what_it_keeps() -> None:
    model = diffusion("sdar").model
    footprint = Footprint.of(model, [], block_causal=True)
    (prefix,) = model.prefill([range(5, 45)], [4], [None])
    kept = prefix.both.nbytes if prefix.both is not None else 0
    assert kept < 40 * footprint.cached_token <= 2 * kept  # two layers more than it has, which are two
    shared, largest = footprint.budgets(1e6 + FIXED_BYTES, 1.0, "cuda", context_length=2048)
    assert shared.cached_tokens == largest.cached_tokens == int(5e5 / footprint.cached_token)
    assert largest.tokens == int(5e5 / (footprint.token + footprint.hidden))
    assert Footprint.of(model, []).budgets(1e9, 1.0, "cuda", context_length=2048)[1].cached_tokens == LEAST


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, LAST_CACHE_BYTES),
        ({"index0/size": "48K\n", "index2/size": "1024K\n", "index3/size": "16M\n"}, 16 << 20),
        ({"index0/size": "32K\n", "index2/size": "2048K\n"}, 2 << 20),  # none is shared
        ({"index0/size": "\n", "index1/size": "unknown\n"}, LAST_CACHE_BYTES),
    ],
)
def test_the_last_cache_is_the_largest_that_linux_names(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/devices/system/cpu/cpu0/cache" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert last_cache_bytes(root=tmp_path) == expected


@pytest.mark.parametrize(
    ("vocabulary", "cache", "rows"),
    [
        (16_384, 32 << 20, 512),  # 64 KiB a row
        (16_384, 480 << 20, 2_048),  # the cap: larger batches gain nothing
        (126_464, 32 << 20, 256),  # the least: smaller ones lose
    ],
)
def test_on_a_cpu_as_many_rows_are_steered_at_once_as_the_last_cache_holds(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, cache: int, rows: int
) -> None:
    monkeypatch.setattr(memory, "last_cache_bytes", lambda: cache)
    footprint = replace(FOOTPRINT, phi_row=4.0 * vocabulary)
    on_cpu, on_gpu = (footprint.budgets(1e13, 0.8, d, context_length=2048)[0] for d in ("cpu", "cuda"))
    assert on_cpu == replace(CAPS["cpu"], guided_rows=rows)
    assert on_gpu == CAPS["cuda"]


def test_settings_win_over_what_is_computed_and_the_worker_reports_what_one_request_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "last_cache_bytes", lambda: 1 << 30)
    files = GOLDEN / "llada-tiny"
    source = RewardSource("rm", str(files / "rm"))
    config = WorkerConfig(str(files / "dlm"), device="cpu", dtype="float64", reward_models=(source,))
    computed = load(config)
    assert computed.runner.book.budget == CAPS["cpu"]  # so small a model fits in any memory
    assert computed.info.largest.tokens > CAPS["cpu"].tokens
    fixed = load(replace(config, batch_tokens=300, batch_trajectories=7))
    for budget in (fixed.runner.book.budget, fixed.info.largest):
        assert budget.tokens == 300
    assert fixed.runner.book.budget.trajectories == 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's count of resident memory")
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_prediction_is_an_upper_bound_of_what_steps_take_and_not_a_loose_one(tmp_path: Path, family: str) -> None:
    shape = Shape(2048, 192, 2, 6, 576)
    dlm = (write_dream if family == "dream" else write_llada)(tmp_path / "dlm", shape)
    rm = write_reward(tmp_path / "rm", Shape(2048, 128, 2, 4, 384))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(dlm), str(rm), "--large"],
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert len(figures) == 5
    for figure in figures:
        assert figure["measured"] <= figure["predicted"], figure
        assert figure["predicted"] <= 3 * figure["measured"] + figure["fixed"], figure


PROGRAM = """
import os, resource, sys, torch
from server.worker.memory import keep_large_blocks
for spare in sys.argv[1:]:
    if child := os.fork():  # importing takes long, and what the C library was told cannot be taken back
        assert os.waitpid(child, 0)[1] == 0
        continue
    assert keep_large_blocks(float(spare)) == (spare != "0")
    faults = []
    for _ in range(24):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(max(faults[-4:]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_large_blocks_stay_with_the_process_and_fault_in_no_pages() -> None:
    command = [sys.executable, "-c", PROGRAM, "4e9", "0", "3e8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kept, left, too_large = map(int, done.stdout.split())
    assert kept < 20
    assert left > 20  # what it is good for: even with huge pages there are two dozen
    assert too_large > 20  # blocks of 48 MiB are not kept where eight of them would be too much
    assert not memory.keep_large_blocks(2e8)
