"""Compiles kernels.cpp (with its headers) once into a cache folder and loads it; says why when it cannot.

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

import torch  # first: it brings the OpenMP runtime, which the library then shares instead of loading a second one

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in order: a compiler without OpenMP or without -march still gives a correct, slower library.
FLAG_SETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
COMPILE_SECONDS = 300

Library = ctypes.CDLL


class CompileError(Exception):
    """No shared library could be built; the message says why."""


def cache_folder() -> Path:
    """ENTRGI_CACHE_DIR, else the user's cache folder; created when missing."""
    explicit = os.environ.get("ENTRGI_CACHE_DIR")
    base = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entrgi"
    folder = base / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def find_compiler() -> str:
    """Path of the C++ compiler: CXX, else the first of `COMPILERS` on the PATH."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise CompileError("no C++ compiler found (looked for " + ", ".join(COMPILERS) + " and $CXX)")


def processor_features() -> str:
    """Everything that -march=native looks at, as one string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(wanted)})])


def build_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Hash of all that shapes the machine code."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in (*sorted(SOURCE.parent.glob("*.h")), SOURCE)]
    parts = (*sources, compiler, version, " ".join(flags), processor_features())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_library(folder: Path) -> Path:
    """The compiled library's path, compiling only if the cache lacks it. Raises CompileError."""
    compiler = find_compiler()
    errors = []
    for extra in FLAG_SETS:
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
    raise CompileError(f"{compiler} failed: {errors[0]}")


@functools.cache
def _load() -> Library | str:
    try:
        return Library(str(compile_library(cache_folder())))
    except (CompileError, OSError) as error:
        log.warning("C++ kernels are not available, plain torch runs instead: %s", error)
        return str(error)


def library() -> Library | None:
    """The loaded library, compiled by the first call (some seconds); None when that failed."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


def unavailable_reason() -> str | None:
    """Why `library()` is None, or None when it is there."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def threads() -> int:
    """OpenMP threads for the library: as many as torch uses."""
    return torch.get_num_threads()
