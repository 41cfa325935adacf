"""A part of `make gpu-check`: the passes over the vocabulary, by every implementation that runs there."""

from __future__ import annotations

import torch

import kernels as ours
from benchmarks.gpu.part import Given, Report
from benchmarks.kernels.__main__ import report
from benchmarks.kernels.compare import Shape, products
from kernels.roofline import BACKENDS

KINDS = ("measured", "estimated")
SHAPES = (
    (2048, 152_064, 2048),  # Dream, sixteen trajectories, a reward model of 1.7B
    (512, 152_064, 2048),
    (128, 126_464, 1024),  # one trajectory of LLaDA, a reward model of 0.6B
)


def kernels(given: Given) -> Report:
    """Milliseconds of each operation, its share of the machine's own rate of copying and of multiplying, and memory."""
    cuda = given.device.type == "cuda"
    names = [name for name in ours.available_backends() if name not in ("reference", *(("cpp",) if cuda else ()))]
    tables = {}
    for rows, vocab_size, hidden in ((16, 512, 64),) if given.tiny else SHAPES:
        dtype = torch.bfloat16 if cuda else torch.float32
        shape = Shape(rows, vocab_size, hidden, 3, dtype, given.device)
        found = report(shape, names, repeats=3 if given.tiny else 10, research=rows <= 512)
        copy = found["copy_bytes_per_second"]
        results = []
        for each in found["results"]:
            row = {"implementation": each["implementation"]}
            row |= {f"{name} ms": 1e3 * seconds for name, seconds in each["seconds"].items()}
            for name in ("row_stats", "draw", "mix", "update"):
                row[f"{name} of copy"] = f"{found['bytes_moved'][name] / each['seconds'][name] / copy:.0%}"
            row |= {"step of products": f"{each['product_share_of_step']:.0%}", "peak (N, V)": each["peak_tensors"]}
            results.append(row)
        tables[f"N = {rows}, V = {vocab_size}, D = {hidden}, M = 3"] = results
        if cuda and "fused" in names:
            chosen = products(shape, repeats=10)
            row = {f"{name} ms, {kind}": 1e3 * chosen[kind][name] for name in BACKENDS for kind in KINDS}
            row |= {"auto takes": chosen["auto_takes"], "right here": chosen["right_here"]}
            tables[f"N = {rows}: products of an inner step, fused or the library's"] = [row]
    return {"tables": tables}
