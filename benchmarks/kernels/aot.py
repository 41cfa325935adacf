"""Compiles every Triton kernel for NVIDIA targets without a GPU, and reports what the assembler made of it.

    python -m benchmarks.kernels.aot [--quick] [--arch 80 90 100]

Triton's wheel brings ptxas and cuobjdump, so registers, spills, shared memory and tensor-core instructions are facts
of the compiled code, known on any machine. A kernel that spills to the stack, passes a limit or misses its tensor
cores fails the program (exit status 1). Prints a table, then one JSON line. Not under TRITON_INTERPRET.
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

ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what one block may use
REGISTERS = 255  # a thread; the architecture's own limit, above which the assembler spills
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

_ALIGNED = ("hidden", "table_stride", "vocab", "row_stride", "width")  # multiples of 16 for every published model
_TYPES = {
    **dict.fromkeys(("row_s_1", "row_s_tau"), "*fp64"),
    **dict.fromkeys(("top_k", "keys", "index", "tokens", "argmax"), "*i64"),
    **dict.fromkeys(("logits", "table", "g"), "*bf16"),
    **dict.fromkeys(("rows", "plane", "vocab", "row_stride", "tile_count", "first", "width", "blocks"), "i32"),
    **dict.fromkeys(("count", "hidden", "table_stride", "drawn", "never"), "i32"),
    **dict.fromkeys(("m_correction", "v_correction"), "fp32"),
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
    """Every kernel in every form in which kernels.gpu.ops launches it."""
    from kernels.gpu import draw, mix, row_stats, update
    from kernels.gpu.ops import DEPTH, ROWS, STAGES, WARPS, WIDTH, pieces

    for dtype in ("bf16", "fp16", "fp32"):
        constants = {"KIND": 0, "TILE": 128, "TILES": 32}
        yield Case(
            row_stats.row_sums,
            f"row_sums {dtype}",
            constants,
            8,
            types=(("logits", "*" + dtype),),
            quick=dtype == "bf16",
        )
    for kind in range(4):
        heavy = kind == 2  # two gradients to follow: the form with the most arithmetic
        tile = {"KIND": kind, "TILE": 128}
        yield Case(row_stats.combine, f"combine kind {kind}", {**tile, "BLOCK": 1024}, 4, quick=heavy)
        yield Case(
            draw.draw,
            f"draw kind {kind}",
            {**tile, "HAS_INDEX": kind == 3, "TILES": 128, "BLOCK": 1024},
            8,
            quick=heavy,
        )
        statistics = {"KIND": kind, "HAS_INDEX": kind == 3, "BLOCK": 1024}
        yield Case(draw.filtered_stats, f"filtered_stats kind {kind}", statistics, 8, quick=heavy)
        yield Case(
            mix.weights,
            f"weights kind {kind}",
            {"KIND": kind, "BLOCK": 4096},
            8,
            types=(("out", "*bf16"),),
            quick=heavy,
        )
        for write in (1, 0 if kind < 2 else 2):
            constants = {"KIND": kind, "WRITE": write}
            yield Case(
                update.step, f"step kind {kind} write {write}", {**constants, "TILE": 128, "TILES": 16}, 8, quick=heavy
            )
            if kind == 3:
                continue
            blocks = {"BM": ROWS, "BN": WIDTH, "BK": DEPTH, "GROUP": 16, "UPCAST": False}
            yield Case(
                update.fused_step,
                f"fused_step kind {kind} write {write}",
                {**constants, **blocks, "SUB": pieces(kind, write)},
                WARPS,
                STAGES,
                tensor_cores=True,
                quick=kind in (0, 2),
            )
    for dtype in ("bf16", "fp32"):
        yield Case(mix.mix, f"mix {dtype}", {"BLOCK": 1024}, 4, types=(("table", "*" + dtype),), quick=dtype == "bf16")
    # Triton makes an integer argument of 1 a constant: one row, and a vocabulary within one tile.
    one = {"KIND": 0, "TILE": 128, "TILES": 32, "plane": 1, "tile_count": 1}
    yield Case(row_stats.row_sums, "row_sums N=1", one, 8)
    yield Case(row_stats.combine, "combine N=1", {**one, "rows": 1, "BLOCK": 1024, "TILES": None}, 4, quick=True)
    yield Case(draw.draw, "draw N=1", {**one, "HAS_INDEX": False, "TILES": 128, "BLOCK": 1024, "plane": None}, 8)
    yield Case(
        update.fused_step,
        "fused_step N=1",
        {"KIND": 0, "WRITE": 0, "UPCAST": False, "plane": 1, "tile_count": 1, "count": 1}
        | {"BM": ROWS, "BN": WIDTH, "BK": DEPTH, "GROUP": 16, "SUB": pieces(0, 0)},
        WARPS,
        STAGES,
        tensor_cores=True,
    )


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

    constants = {name: value for name, value in case.constants.items() if value is not None}
    names = case.kernel.arg_names
    types = {name: dict(case.types).get(name, _TYPES.get(name, "*fp32")) for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [n for n in names if n not in constants and (types[n].startswith("*") or n in _ALIGNED)]
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
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns about its changing default
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
    import triton

    print(json.dumps({"triton": triton.__version__, "kernels": [asdict(r) for r in results]}))
    return 1 if any(r.problems for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
