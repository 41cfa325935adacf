"""What a worker takes of its machine, and that a wrong setting is named before anything is served."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import ConfigurationError
from server.types import Message
from server.wire.config import RewardSource, WorkerConfig
from server.wire.messages import Score, Scored
from server.worker.failures import is_out_of_memory
from server.worker.loop import import_service
from server.worker.savings import Savings
from server.worker.service import default_threads, load, resolve_device, resolve_dtype
from tests.support.encoders import write_encoder
from tests.support.kernels import choose_kernels
from tests.support.models import CPU, GOLDEN

FILES = GOLDEN / "llada-tiny"
RM = str(FILES / "rm")
DREAM = str(GOLDEN / "dream-tiny/dlm")
CONFIG = WorkerConfig(str(FILES / "dlm"), device="cpu", dtype="float64")


def test_a_service_without_reward_models_warms_up_unguided() -> None:
    service = load(replace(CONFIG, max_model_len=100, served_model_name="a-name"))
    assert (service.info.model.id, service.info.model.context_length) == ("a-name", 100)
    assert service.info.model.family == "llada"
    assert service.info.model.dtype == "float64"
    assert service.info.reward_models == ()
    assert service.info.kernel_backend
    assert service.runner.stats.denoising_steps == 0
    assert service.runner.savings == Savings()
    service.check_device()


def test_reward_models_keep_their_order_and_names_and_savings_are_turned_off_by_name() -> None:
    off = ("skip_empty_steps", "head_on_masked_rows")
    sources = RewardSource("z", RM), RewardSource("a", RM)
    service = load(replace(CONFIG, reward_models=sources, vocab_fallback="zero", disable_savings=off))
    assert [info.id for info in service.info.reward_models] == ["z", "a"]
    assert {info.vocab_fallback for info in service.info.reward_models} == {"zero"}
    assert service.runner.savings == replace(Savings(), skip_empty_steps=False, head_on_masked_rows=False)


def test_encoders_are_rewards_without_a_gradient_in_the_order_of_the_settings(tmp_path: Path) -> None:
    """Alone they need no budget of their own: as many of their texts go into a step as into one of their passes."""
    folder = str(write_encoder(tmp_path))
    mood, pair = RewardSource("mood", folder, "positive"), RewardSource("pair", folder, 0, "log_softmax", "pair")
    service = load(replace(CONFIG, reward_models=(mood, RewardSource("rm", RM), pair)))
    told = [(each.id, each.gradient, each.label, each.output, each.input) for each in service.info.reward_models]
    assert told == [
        ("mood", False, "positive", "logit", "response"),
        ("rm", True, None, "logit", None),
        ("pair", False, "negative", "log_softmax", "pair"),
    ]
    assert list(service.runner.reward_models) == ["rm"]
    alone = load(replace(CONFIG, reward_models=(mood,)))
    items = [((Message("user", "Good?"),), "It is good.")] * 50
    alone.scorer.add(Score("many", "mood", items))
    (scored,) = alone.scorer.step()
    assert isinstance(scored, Scored)
    assert len(scored.scores) == len(items)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "/nonexistent/checkpoint"}, "model"),
        ({"model": str(FILES)}, "config.json"),
        ({"model": RM}, "Qwen3ForSequenceClassification"),
        ({"reward_models": (RewardSource("rm", str(FILES / "dlm")),)}, "rm"),
        ({"device": "toaster"}, "device: 'toaster' cannot be used"),
        ({"device": "cuda", "rank": 99}, "device: 'cuda' cannot be used by worker 99"),
        ({"reward_device": "cuda:99"}, "reward_device: 'cuda:99' cannot be used"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"disable_savings": ("skip_nothing",)}, "disable_savings"),
        ({"attention_backend": "varlen"}, "attention_backend: varlen cannot run here: it needs a CUDA device"),
        ({"kernels": "fused"}, "kernels: 'fused' cannot run here: it needs a CUDA device, triton and 16-bit weights"),
        ({"attention_backend": "fast"}, "attention_backend: 'fast' is not one of auto, varlen, cpp, sdpa"),
        ({"attention": "block_causal"}, "block_length: attention is block_causal, and neither the settings"),
        ({"attention": "block_causal", "model": DREAM}, "attention: block_causal is not implemented for dream"),
        ({"attention": "block_causal", "block_length": 4, "compile": True}, "compile: cached prefixes"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        load(replace(CONFIG, **changes))


@pytest.mark.parametrize("native", [False, True])
def test_automatic_device_and_dtype_follow_the_machine_and_the_checkpoint(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu", 3) == CPU  # every worker may be on it
    choose_kernels(monkeypatch, BFLOAT16=str(int(native)))
    assert resolve_dtype("auto", CPU, torch.bfloat16) == (torch.bfloat16 if native else torch.float32)
    for own in (torch.float32, torch.float16, None):
        assert resolve_dtype("auto", CPU, own) == torch.float32
        assert resolve_dtype("auto", torch.device("cuda"), own) == torch.bfloat16
    assert resolve_dtype("float32", CPU, torch.bfloat16) == torch.float32


@pytest.mark.parametrize(("workers", "threads"), [(1, 7), (2, 3), (3, 2), (7, 1), (20, 1)])
def test_workers_share_the_cores_but_one(workers: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_threads(CPU, workers) == threads
    assert default_threads(torch.device("cuda"), workers) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert default_threads(CPU, workers) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's word
    assert default_threads(CPU, workers) == 0


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_gpu_memory_grow_unless_the_user_has_said_something(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:512")  # so that it is put back
        if name != own:
            monkeypatch.delenv(name)
    import_service()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
    }.get(own)  # fmt: skip


def test_memory_that_runs_out_is_recognised_by_what_torch_really_raises() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("something else"))
    assert not is_out_of_memory(ValueError("out of memory"))
