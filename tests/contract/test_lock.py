"""Pinned versions, in the lock files and for the conformance clients: nothing in them belongs to one machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.serving import ROOT

LOCKS = [ROOT / f"requirements{name}.lock" for name in ("", "-otel", "-eval", "-ray", "-dev")]
CLIENTS = sorted((ROOT / "tests/conformance").glob("*/requirements.txt"))
FROM_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*")


def requirements(path: Path) -> list[Requirement]:
    """Refuses options and hashes, which are none."""
    lines = path.read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pins(path: Path) -> set[tuple[str, str]]:
    return {pin(requirement) for requirement in requirements(path)}


def pin(requirement: Requirement) -> tuple[str, str]:
    return canonicalize_name(requirement.name), str(requirement.specifier)


@pytest.mark.parametrize("path", [*LOCKS, *CLIENTS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_line_is_one_exact_public_version(path: Path) -> None:
    """No local versions such as +cpu, no URLs, and no CUDA libraries, which are left to torch."""
    for requirement in requirements(path):
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert not FROM_TORCH.fullmatch(requirement.name), requirement


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_hold_no_host_and_not_the_package_that_would_shadow_our_kernels(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "://" not in text
    assert "--" not in text
    assert len(requirements(path)) > 40
    assert not any(requirement.extras for requirement in requirements(path))
    assert "kernels" not in {name for name, _ in pins(path)}


def test_the_locks_agree_with_the_project_and_with_each_other() -> None:
    runtime, tracing, evaluation, serve, everything = (pins(path) for path in LOCKS)
    assert runtime < tracing < everything
    assert runtime < evaluation
    assert runtime < serve
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {pin(Requirement(line)) for line in project["project"]["dependencies"]} <= runtime
    extras = project["project"]["optional-dependencies"]
    assert {pin(Requirement(line)) for line in extras["otel"]} <= tracing - runtime
    assert {pin(Requirement(line)) for line in extras["eval"]} <= evaluation - runtime
    assert {pin(Requirement(line)) for line in extras["ray"] + extras["otel"]} <= serve - runtime
    assert {pin(Requirement(line)) for line in project["dependency-groups"]["dev"]} <= everything


def test_the_clients_environments_hold_what_they_were_made_for() -> None:
    assert len(CLIENTS) >= 6
    for path in CLIENTS:
        assert pins(path.with_suffix(".in")) <= pins(path), path
