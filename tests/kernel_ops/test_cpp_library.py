"""The compiled library: its arithmetic, its cache, and what happens without a compiler."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.cpp.ops import CppState
from tests.support.kernels import choose_kernels

needs_compiler = pytest.mark.skipif("cpp" not in kernels.available_backends(), reason="no C++ compiler")

PROBE = "import kernels; print(kernels.default_backend(), *kernels.available_backends())"


def start_probe(**environment: str) -> subprocess.Popen:
    """A fresh Python that prints which backend it chose."""
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "KERNELS_CPP": "native", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_compiler
def test_exponential_is_good_to_its_last_place():
    """Seen through the weights exp((phi - maximum) / tau) of a row whose maximum is 0 and whose tau is 1."""
    usual = torch.cat([torch.linspace(-87.3, 0, 400_001), -torch.logspace(-30, 1, 10_000), torch.tensor([-1e-45])])
    x = torch.cat([usual, torch.tensor([-87.4, -1e4, -torch.inf, torch.nan])])[None]
    one = torch.ones(1)
    out = torch.empty_like(x)
    CppState(x, kernels.RowParams(one, one, one.long(), one > 1, one), None)._weights(0, out)
    ours, truth = out[0, : len(usual)].double(), usual.double().exp()
    relative, plain = (((found - truth) / truth).abs().max() for found in (ours, usual.exp().double()))
    assert relative < 1.3e-7
    assert relative < 2 * plain + 6e-8
    assert out[0, -4:-1].tolist() == [0, 0, 0]
    assert out[0, -1].isnan()


@needs_compiler
@pytest.mark.slow
def test_processes_that_compile_together_share_one_library(tmp_path):
    probes = [start_probe(ENTRGI_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for probe in probes:
        out, err = probe.communicate(timeout=240)
        assert out.split()[0] == "cpp", err
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]
    library = next((tmp_path / "kernels").iterdir())
    written = library.stat().st_mtime_ns
    out, err = start_probe(ENTRGI_CACHE_DIR=str(tmp_path)).communicate(timeout=240)
    assert out.split()[0] == "cpp", err
    assert library.stat().st_mtime_ns == written  # the cache was used


def test_c_plus_plus_can_be_turned_off(monkeypatch):
    choose_kernels(monkeypatch, CPP="off")
    assert "cpp" not in kernels.available_backends()
    with pytest.raises(ValueError, match="not available: KERNELS_CPP is off"):
        CppState(torch.zeros(1, 2), None, None)


@pytest.mark.parametrize("broken", ["compiler", "cache folder", "no compiler"])
def test_a_library_that_cannot_be_built_is_reported(tmp_path, broken):
    compiler, cache = tmp_path / "g++", tmp_path / "kernels"
    compiler.write_text("#!/bin/sh\necho 'internal error' >&2\nexit 1\n")
    compiler.chmod(0o755)
    if broken == "cache folder":
        cache.write_text("a file where the folder should be")
    found = {"PATH": str(tmp_path / "empty"), "CXX": ""} if broken == "no compiler" else {"CXX": str(compiler)}
    out, err = start_probe(ENTRGI_CACHE_DIR=str(tmp_path), **found).communicate(timeout=240)
    assert out.split() == ["torch", "reference", "torch"], err
    assert err.count("plain torch runs instead") == 1
    assert ("no C++ compiler" in err) == (broken == "no compiler")
    if broken == "compiler":
        assert "internal error" in err
        assert not list(cache.iterdir())
