"""The compiled library: its arithmetic, its cache, and what happens without a compiler."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kernels
from kernels.cpp import CppState, build
from kernels.random import row_keys, uniform
from tests.support.kernels import choose_kernels

needs_compiler = pytest.mark.skipif("cpp" not in kernels.available_backends(), reason="no C++ compiler")

PROBE = "import kernels; print(kernels.backend_info()['draw'], *kernels.available_backends())"


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
    x = np.concatenate([np.linspace(-87.3, 0, 400_001), -np.logspace(-30, 1, 10_000), [0.0, -1e-45]]).astype(np.float32)
    out = np.empty_like(x)
    build.library().exponentials(
        x.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(x)), out.ctypes.data_as(ctypes.c_void_p)
    )
    truth = np.exp(x.astype(np.float64))
    relative = np.abs(out - truth) / truth
    plain = np.abs(torch.from_numpy(x).exp().double().numpy() - truth) / truth
    assert relative.max() < 1.3e-7
    assert relative.max() < 2 * plain.max() + 6e-8
    special = np.array([-87.4, -1e4, -np.inf, np.nan], dtype=np.float32)
    out = np.empty_like(special)
    build.library().exponentials(
        special.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(4), out.ctypes.data_as(ctypes.c_void_p)
    )
    assert out[:3].tolist() == [0, 0, 0]
    assert np.isnan(out[3])


@needs_compiler
def test_the_same_random_numbers_as_in_torch():
    g = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, 2**bound, (1000,), generator=g) for bound in (62, 16, 16, 31, 8, 31)]
    columns[0] = torch.where(columns[0] % 2 == 0, columns[0], -columns[0])
    keys = row_keys(*columns)
    out = torch.empty(1000, dtype=torch.float64)
    for round_ in (0, 1, 64):
        pointers = [ctypes.c_void_p(keys.data_ptr()), ctypes.c_int64(1000), round_, ctypes.c_void_p(out.data_ptr())]
        build.library().uniforms(*pointers)
        assert out.equal(uniform(keys, round_))


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


def test_without_a_compiler_plain_torch_runs(tmp_path):
    out, err = start_probe(ENTRGI_CACHE_DIR=str(tmp_path), PATH=str(tmp_path), CXX="").communicate(timeout=240)
    assert out.split() == ["torch", "reference", "torch"], err
    assert err.count("plain torch runs instead") == 1
    assert "no C++ compiler" in err


def test_c_plus_plus_can_be_turned_off(monkeypatch):
    choose_kernels(monkeypatch, CPP="off")
    assert "cpp" not in kernels.available_backends()
    with pytest.raises(ValueError, match="not available: KERNELS_CPP is off"):
        CppState(torch.zeros(1, 2), None, None)


def test_a_compiler_that_fails_is_reported(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'internal error' >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, err = start_probe(ENTRGI_CACHE_DIR=str(tmp_path), CXX=str(compiler)).communicate(timeout=240)
    assert out.split()[0] == "torch", err
    assert "internal error" in err
    assert not list((tmp_path / "kernels").iterdir())


def test_an_unusable_cache_folder_is_reported(tmp_path):
    (tmp_path / "kernels").write_text("a file where the folder should be")
    out, err = start_probe(ENTRGI_CACHE_DIR=str(tmp_path)).communicate(timeout=240)
    assert out.split()[0] == "torch", err
    assert "plain torch runs instead" in err
