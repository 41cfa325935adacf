"""Compiles every Triton kernel for NVIDIA targets without a GPU, and reports what the assembler made of it.

    python -m benchmarks.kernels.aot [--quick] [--arch 80 89 90 100]

Only the triton that torch pins (`PINNED`) says what a server will run; another one is refused unless `--any-triton` is
given, since compilers differ in registers and spills. Triton's wheel brings ptxas and cuobjdump, so registers, spills,
shared memory and tensor-core instructions are facts of the compiled code, known on any machine. A kernel that spills to
the stack, passes a limit or misses its tensor cores fails the program (exit status 1). Prints a table, then one JSON
line. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

PINNED = "3.7.1"  # what torch 2.13.0, the version in requirements.lock, depends on
ARCHITECTURES = (80, 89, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what one block may use
REGISTERS = 255  # a thread; the architecture's own limit, above which the assembler spills
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

_ALIGNED = ("hidden", "table_stride", "vocab", "row_stride", "width", "first", "part_width")
"""Multiples of 16 for every published model, as addresses are unless a kernel does not rely on it."""
_TYPES = {
    **dict.fromkeys(("row_s_1", "row_s_tau"), "*fp64"),
    **dict.fromkeys(("top_k", "keys", "index", "tokens", "argmax", "place"), "*i64"),
    **dict.fromkeys(("scratch", "arrived"), "*i32"),
    **dict.fromkeys(("logits", "table", "g", "weights", "narrow", "embeds"), "*bf16"),
    **dict.fromkeys(("rows", "plane", "vocab", "row_stride", "tile_count", "first", "width", "blocks"), "i32"),
    **dict.fromkeys(("count", "hidden", "table_stride", "drawn", "never", "part_width"), "i32"),
    **dict.fromkeys(("m_correction", "v_correction", "steep"), "fp32"),
    "greedy": "*u8",
}  # everything else is a pointer to float32


@dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time constants."""

    kernel: Any
    name: str
    constants: dict[str, Any]
    warps: int
    stages: int = 2
    tensor_cores: bool = False
    types: tuple[tuple[str, str], ...] = ()
    quick: bool = False  # part of the subset that the tests compile


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a case on one architecture."""

    name: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int  # 128-bit loads from global memory
    compile_seconds: float
    problems: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Every kernel in every form in which kernels.gpu.ops and kernels.gpu.fused launch it."""
    from kernels.gpu import draw, kept, mix, row_stats, update
    from kernels.gpu.fused import DEPTH, GROUP, ROWS, STAGES, WARPS, parts
    from kernels.gpu.ops import SEARCH, WIDTH

    blocks = {"BM": ROWS, "BN": WIDTH, "BK": DEPTH, "UPCAST": False}
    for dtype in ("bf16", "fp16", "fp32"):
        types = (("logits", "*" + dtype),)
        constants = {"KIND": 0, "TILE": WIDTH, "TILES": 32}
        yield Case(row_stats.row_sums, f"row_sums {dtype}", constants, 8, types=types, quick=dtype == "bf16")
    for kind in range(4):
        heavy = kind == 2  # two gradients to follow: the form with the most arithmetic
        for soft in (False, True):
            constants = {"KIND": kind, "SOFT": soft, "TILE": WIDTH, "BLOCK": 1024}
            name = f"combine kind {kind}" + " soft" * soft
            yield Case(row_stats.combine, name, constants, 4, quick=heavy and soft)
        constants = {"KIND": kind, "HAS_INDEX": kind == 3}
        tile = {"TILE": WIDTH, "TILES": 128, "BLOCK": 1024}
        yield Case(draw.draw, f"draw kind {kind}", {**constants, **tile}, 8, quick=heavy)
        yield Case(kept.draw_kept, f"draw_kept kind {kind}", {**constants, **SEARCH}, 8, quick=heavy)
        constants |= {"TILE": WIDTH, **SEARCH}
        yield Case(kept.filtered_stats, f"filtered_stats kind {kind}", constants, 8, quick=heavy)
        constants = {"KIND": kind, "BLOCK": 4096}
        yield Case(mix.weights, f"weights kind {kind}", constants, 8, types=(("out", "*bf16"),), quick=heavy)
        for write in (1, 0 if kind < 2 else 2):
            constants, name = {"KIND": kind, "WRITE": write}, f"kind {kind} write {write}"
            yield Case(update.step, f"step {name}", {**constants, "TILE": WIDTH, "TILES": 16}, 8, quick=heavy)
            if kind == 3:
                continue
            constants |= {**blocks, "SOFT": write != 1, "GROUP": GROUP}
            quick = kind in (0, 2)
            yield Case(update.fused_step, f"fused_step {name}", constants, WARPS, STAGES, True, quick=quick)
    yield Case(update.slopes, "slopes", {"BLOCK": 1024}, 4, types=(("g", "*fp32"),))
    for placed in (False, True):
        constants = {**blocks, "PLACED": placed, "PARTS": parts(151_936, 2048)[0]}
        types = (("embeds", "*bf16" if placed else "*fp32"),)
        name = "fused_mix" + " placed" * placed
        yield Case(mix.fused_mix, name, constants, WARPS, STAGES, True, types=types, quick=placed)
    for dtype in ("bf16", "fp32"):
        types = (("table", "*" + dtype),)
        yield Case(mix.mix, f"mix {dtype}", {"PLACED": True, "BLOCK": 1024}, 4, types=types, quick=dtype == "bf16")


def block_cases() -> Iterator[Case]:
    """Every kernel of kernels.gpu.blocks, at the widths of Skywork's 1.7B and of Dream-7B."""
    from kernels.gpu import blocks

    weights, gradients = ("weight", "q_weight", "k_weight"), ("g", "g_q", "g_k", "g_v", "more")
    pointers = ("x", "added", "total", "out", "q", "k", "v", *weights, *gradients)
    numbers = (("heads", "i32"), ("key_heads", "i32"), ("epsilon", "fp32"))
    for dtype in ("bf16", "fp16", "fp32"):
        types, quick = (*((name, f"*{dtype}") for name in pointers), *numbers), dtype == "bf16"
        for width in (2048, 3584):
            form = blocks.norm_form(width)
            constants, warps = {"ADDS": True, "BLOCK": form["BLOCK"]}, form["num_warps"]
            yield Case(blocks.norm, f"norm {width} {dtype}", constants, warps, types=types, quick=quick)
            yield Case(blocks.norm_gradient, f"norm_gradient {width} {dtype}", constants, warps, types=types)
        tile = {"BLOCK": blocks.TILE}
        yield Case(blocks.gate, f"gate {dtype}", tile, 4, types=types)
        yield Case(blocks.gate_gradient, f"gate_gradient {dtype}", tile, 4, types=types, quick=quick)
        for normed in (False, True):
            constants, name = blocks.split_form(64, normed=normed), f"{'with norms ' * normed}{dtype}"
            yield Case(blocks.split, f"split {name}", constants, 4, types=types)
            yield Case(blocks.split_gradient, f"split_gradient {name}", constants, 4, types=types, quick=quick)


def compile_case(case: Case, architecture: int) -> Compiled:
    """Compiles and disassembles; raises RuntimeError where the tools' output cannot be read."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, names = case.constants, case.kernel.arg_names
    types = {name: dict(case.types).get(name, _TYPES.get(name, "*fp32")) for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    specialised = [p.name for p in case.kernel.params if p.name not in constants and not p.do_not_specialize]
    aligned = [name for name in specialised if types[name].startswith("*") or name in _ALIGNED]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    started = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    seconds = time.perf_counter() - started
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run([os.path.join(tools, "cuobjdump"), "-res-usage", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in cuobjdump's output: {usage[:200]}")
    registers, stack = int(found[1]), int(found[2])
    ptx = compiled.asm["ptx"]
    shared, instructions = int(compiled.metadata.shared), ptx.count(TENSOR_CORE[architecture])
    problems = []
    if stack:
        problems.append(f"spills {stack} bytes")
    if registers > REGISTERS:
        problems.append(f"{registers} registers")
    if shared > SHARED_BYTES[architecture]:
        problems.append(f"{shared} bytes of shared memory")
    if case.tensor_cores and not instructions:
        problems.append("no tensor-core instructions")
    return Compiled(
        name=case.name,
        architecture=architecture,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_core_instructions=instructions,
        wide_loads=len(re.findall(r"ld\.global[^;]*\.v4\.b32", ptx)),
        compile_seconds=round(seconds, 2),
        problems=tuple(problems),
    )


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {result.stderr.strip()}")
    return result.stdout


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU and report resources.")
    parser.add_argument("--quick", action="store_true", help="only a representative subset")
    parser.add_argument("--any-triton", action="store_true", help=f"take a triton that is not {PINNED}")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns about its changing default
    import triton

    if triton.__version__ != PINNED and not options.any_triton:
        print(f"triton {triton.__version__} is not the {PINNED} that torch pins: see --any-triton", file=sys.stderr)
        return 2
    results = []
    columns = "{:<28} {:>5} {:>5} {:>6} {:>8} {:>6} {:>6} {:>8}  {}"
    print(columns.format("kernel", "arch", "regs", "stack", "shared", "tensor", "ld128", "seconds", "problems"))
    for case in (*cases(), *block_cases()):
        if options.quick and not case.quick:
            continue
        for architecture in options.arch:
            r = compile_case(case, architecture)
            results.append(r)
            print(
                columns.format(
                    r.name,
                    f"sm_{architecture}",
                    r.registers,
                    r.stack_bytes,
                    r.shared_bytes,
                    r.tensor_core_instructions,
                    r.wide_loads,
                    f"{r.compile_seconds:.1f}",
                    "; ".join(r.problems),
                ),
                flush=True,
            )
    print(json.dumps({"triton": triton.__version__, "kernels": [asdict(r) for r in results]}))
    return 1 if any(r.problems for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
