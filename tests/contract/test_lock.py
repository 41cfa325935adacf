"""The lock files: versions and nothing that belongs to one machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-otel.lock", "requirements-dev.lock")
FROM_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*")


def pinned(lock: str) -> list[Requirement]:
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_is_one_exact_public_version(lock: str) -> None:
    """No options, URLs or hashes (Requirement refuses them), no local versions such as +cpu."""
    requirements = pinned(lock)
    assert len(requirements) > 40
    for requirement in requirements:
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert not requirement.extras


@pytest.mark.parametrize("lock", LOCKS)
def test_no_host_anywhere_in_the_file(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")
    assert "://" not in text
    assert "--" not in text


@pytest.mark.parametrize("lock", LOCKS)
def test_cuda_libraries_are_left_to_torch(lock: str) -> None:
    assert [r.name for r in pinned(lock) if FROM_TORCH.fullmatch(r.name)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_the_package_that_would_shadow_our_kernels_is_not_there(lock: str) -> None:
    assert "kernels" not in {canonicalize_name(r.name) for r in pinned(lock)}


def test_the_locks_agree_with_the_project_and_with_each_other() -> None:
    runtime = {(canonicalize_name(r.name), str(r.specifier)) for r in pinned("requirements.lock")}
    everything = {(canonicalize_name(r.name), str(r.specifier)) for r in pinned("requirements-dev.lock")}
    tracing = {(canonicalize_name(r.name), str(r.specifier)) for r in pinned("requirements-otel.lock")}
    assert runtime < tracing < everything
    for line in project()["project"]["optional-dependencies"]["otel"]:
        wanted = Requirement(line)
        assert (canonicalize_name(wanted.name), str(wanted.specifier)) in tracing - runtime
    for line in project()["project"]["dependencies"]:
        wanted = Requirement(line)
        assert (canonicalize_name(wanted.name), str(wanted.specifier)) in runtime
    for line in project()["dependency-groups"]["dev"]:
        wanted = Requirement(line)
        assert (canonicalize_name(wanted.name), str(wanted.specifier)) in everything
