"""What is said of GPUs that torch cannot use. The machine is a folder laid out as Linux shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.worker import nvidia

VERSION = "NVRM version: NVIDIA UNIX {} {}  Release Build\nGCC version: gcc 12.2.0"


def machine(root: Path, *, driver: str | None, kind: str = "x86_64 Kernel Module") -> Path:
    """One NVIDIA GPU with its sound device, another maker's GPU, and a driver."""
    for name, vendor, of in (
        ("01:00.0", "0x10de", "0x030200"),
        ("01:00.1", "0x10de", "0x040300"),
        ("02:00.0", "0x1002", "0x030000"),
    ):
        device = root / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(of + "\n")
    if driver is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(VERSION.format(kind, driver))
    return root


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_gpus_and_driver_are_those_that_linux_shows(tmp_path: Path, kind: str) -> None:
    root = machine(tmp_path, driver="580.65.06", kind=kind)
    assert (nvidia.gpus(root=root), nvidia.driver(root=root)) == (1, "580.65.06")


def test_a_machine_without_gpus_is_not_complained_about(tmp_path: Path) -> None:
    assert (nvidia.gpus(root=tmp_path), nvidia.driver(root=tmp_path)) == (0, None)
    assert nvidia.why_unused(root=tmp_path) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
@pytest.mark.parametrize(
    ("built", "driver", "expected"),
    [
        (None, "580.65.06", "is a build for CPUs"),
        ("13.0", None, "no driver is loaded here: install NVIDIA's driver 580 or newer"),
        ("13.0", "550.54.14", "driver 550.54.14 is too old for torch's CUDA 13.0: install 580 or newer"),
        ("12.8", "470.82", "driver 470.82 is too old for torch's CUDA 12.8: install 525 or newer"),
        ("12.8", "550.54.14", "torch's CUDA 12.8 does not start with driver 550.54.14"),
    ],
)
def test_a_gpu_that_torch_does_not_see_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, driver: str | None, expected: str
) -> None:
    root = machine(tmp_path, driver=driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert expected in nvidia.why_unused(root=root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia.why_unused(root=root) == ""
