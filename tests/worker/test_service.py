"""What can be wrong with the worker's settings is said by name, before anything is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.errors import ConfigurationError
from server.wire.config import WorkerConfig
from server.worker.failures import is_out_of_memory
from server.worker.savings import Savings
from server.worker.service import load, resolve_device, resolve_dtype
from tests.support.kernels import choose_kernels

GOLDEN = Path(__file__).parents[1] / "golden" / "llada-tiny"
CONFIG = WorkerConfig(str(GOLDEN / "dlm"), device="cpu", dtype="float64")


def test_a_service_without_reward_models_warms_up_unguided() -> None:
    service = load(replace(CONFIG, max_model_len=100, served_model_name="a-name"))
    assert (service.info.model.id, service.info.model.context_length) == ("a-name", 100)
    assert service.info.model.family == "llada"
    assert service.info.model.dtype == "float64"
    assert service.info.reward_models == ()
    assert service.info.kernel_backend
    assert service.runner.stats.denoising_steps == 0
    service.check_device()


def test_reward_models_keep_their_order_and_names() -> None:
    rewards = {"z": str(GOLDEN / "rm"), "a": str(GOLDEN / "rm")}
    service = load(replace(CONFIG, reward_models=rewards, vocab_fallback="zero"))
    assert [info.id for info in service.info.reward_models] == ["z", "a"]
    assert {info.vocab_fallback for info in service.info.reward_models} == {"zero"}


def test_savings_are_turned_off_by_name() -> None:
    assert load(CONFIG).runner.savings == Savings()
    service = load(replace(CONFIG, disable_savings=("skip_empty_steps", "head_on_masked_rows")))
    assert service.runner.savings == replace(Savings(), skip_empty_steps=False, head_on_masked_rows=False)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "/nonexistent/checkpoint"}, "model"),
        ({"model": str(GOLDEN)}, "config.json"),
        ({"model": str(GOLDEN / "rm")}, "Qwen3ForSequenceClassification"),
        ({"reward_models": {"rm": str(GOLDEN / "dlm")}}, "rm"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "toaster"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"disable_savings": ("skip_nothing",)}, "disable_savings"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        load(replace(CONFIG, **changes))  # type: ignore[arg-type]


def test_automatic_device_and_dtype_fit_each_other() -> None:
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("native", ["0", "1"])
def test_automatic_dtype_on_a_cpu_follows_the_checkpoint_and_the_processor(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernels(monkeypatch, BFLOAT16=native)
    expected = torch.bfloat16 if native == "1" else torch.float32
    assert resolve_dtype("auto", torch.device("cpu"), torch.bfloat16) == expected
    for own in (torch.float32, torch.float16, None):
        assert resolve_dtype("auto", torch.device("cpu"), own) == torch.float32
    assert resolve_dtype("float32", torch.device("cpu"), torch.bfloat16) == torch.float32


def test_memory_that_runs_out_is_recognised_by_what_torch_really_raises() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("something else"))
