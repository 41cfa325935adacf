"""Compiles kernels.cpp (with its headers) once into a cache folder, loads it and calls it; says why when it cannot.

The file's name in the cache is a hash of everything that shapes the code: the sources, the compiler and its version,
the flags and the processor's features (`-march=native` code must not meet another machine's processor through a
shared home directory). It is written under a temporary name and renamed, so processes that start together may all
compile, and none sees half a file. Without a compiler, or when compilation fails, the reason is logged once and kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch  # first: it brings the OpenMP runtime, which the library then shares instead of loading a second one
from torch import Tensor

from kernels.settings import processor, settings

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in order: a compiler without OpenMP or without -march still gives a correct, slower library.
BASELINE_FLAGS: tuple[tuple[str, ...], ...] = (("-fopenmp",), ())
# Where a processor has vectors of 512 bits, compilers still prefer 256, but these passes are a tenth faster with 512.
NATIVE_FLAGS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    *BASELINE_FLAGS,
)
COMPILE_SECONDS = 300

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # all that a pass takes; `enum Dtype` of tiles.h
_KINDS = {int: ctypes.c_int64, float: ctypes.c_float}  # all others are pointers


def cache_folder() -> Path:
    """ENTRGI_CACHE_DIR, else the user's cache folder; created when missing."""
    explicit = os.environ.get("ENTRGI_CACHE_DIR")
    base = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entrgi"
    folder = base / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def find_compiler() -> str:
    """Path of the C++ compiler: CXX, else the first of `COMPILERS` on the PATH."""
    paths = (shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name)
    found = next(filter(None, paths), None)
    if found is None:
        raise RuntimeError("no C++ compiler found (looked for " + ", ".join(COMPILERS) + " and $CXX)")
    return found


def build_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Hash of all that shapes the machine code: of the processor only what the flags make it depend on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in (*sorted(SOURCE.parent.glob("*.h")), SOURCE)]
    features = processor() if any("native" in flag for flag in flags) else ()
    parts = (*sources, compiler, version, " ".join(flags), platform.machine(), *features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_library(folder: Path, flag_sets: tuple[tuple[str, ...], ...]) -> Path:
    """The compiled library's path, compiling only if the cache lacks it. Raises RuntimeError."""
    compiler = find_compiler()
    errors = []
    for extra in flag_sets:
        flags = (*COMMON_FLAGS, *extra)
        target = folder / f"kernels-{build_key(compiler, flags)}.so"
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "kernels.so"
            command = [compiler, *flags, str(SOURCE), "-o", str(output)]
            try:
                result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                errors.append(str(error))
                continue
            if result.returncode == 0:
                output.replace(target)
                return target
            errors.append(result.stderr.strip() or f"exit status {result.returncode}")
    raise RuntimeError(f"{compiler} failed: {errors[0]}")


@functools.cache
def _load(target: str) -> ctypes.CDLL | str:
    if target == "off":
        return "KERNELS_CPP is off"
    try:
        flags = BASELINE_FLAGS if target == "baseline" else NATIVE_FLAGS
        return ctypes.CDLL(str(compile_library(cache_folder(), flags)))
    except (RuntimeError, OSError) as error:
        log.warning("C++ kernels are not available, plain torch runs instead: %s", error)
        return str(error)


def library() -> ctypes.CDLL | None:
    """The loaded library, compiled by the first call (some seconds); None when that failed."""
    loaded = _load(settings().cpp)
    return None if isinstance(loaded, str) else loaded


def unavailable_reason() -> str | None:
    """Why `library()` is None, or None when it is there."""
    loaded = _load(settings().cpp)
    return loaded if isinstance(loaded, str) else None


def runs() -> bool:
    """Whether attention and the passes of decoder blocks run in C++: there is a library, and nobody asks for torch."""
    return not settings().plain and library() is not None


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the library: tensors go by address (None as a null pointer), integers as int64, floats as
    float, what ctypes points to by its address. The first call of a function declares its types, so that ctypes
    converts what all others pass."""
    function = getattr(_load(settings().cpp), name)
    if function.argtypes is None:
        function.argtypes = [_KINDS.get(type(value), ctypes.c_void_p) for value in arguments]
        function.restype = None
    function(*[value.data_ptr() if type(value) is Tensor else value for value in arguments])
