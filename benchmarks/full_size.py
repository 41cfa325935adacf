"""Full width without weights: checkpoints of published sizes with random numbers in them, loaded and run.

`python -m benchmarks.full_size --serve` writes a converted Qwen3-0.6B and a reward model of the same size (1.2 GB each,
in a temporary folder), starts the server on them and sends it requests. It prints a line for each, then one JSON line
with the seconds and the memory of the server's largest process at its peak.

`python -m benchmarks.full_size` writes a Dream-7B cut to two layers (3.1 GB) and a reward model of a 1.7B's width (0.9
GB). A fresh process loads them through the real loaders and runs one EntRGi step: forward, a gradient step through the
reward model, draw, reveal. It prints a table of time and memory, then one JSON line. What to look for: nothing is held
twice. In bfloat16 on the CPU the weights are the mapped file, so pages that no token used never come in; in another
`--dtype` they are the converted weights and, while it is converted, the largest single tensor (1.1 GB). (Linux only: it
reads /proc.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from benchmarks.checkpoints import SPECIAL, Shape, write_reward, write_tokenizer
from benchmarks.processes import served
from benchmarks.workload import run_to_end
from server.models.loading import LoadedDiffusionModel, load_diffusion_model
from server.models.registry import family_of
from server.models.weights import stored_tensors
from server.rewards.classifier import find_classifier
from server.rewards.reward_model import RewardModel, load_reward_model
from server.types import DiffusionParams, GuidanceParams, Job, Message, SamplingParams, WeightedReward
from server.worker.runner import Runner

DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""The published config.json of Dream-v0-Instruct-7B, as far as a network can depend on it."""

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "a2d-qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""The same of Qwen3-0.6B, under the names that its conversions have."""

TOKENIZER_SIZE = 151_667
REWARD_1_7B_CUT = Shape(vocab_size=151_936, hidden=2048, layers=2, heads=16, intermediate=6144)
PROMPT_TOKENS = 8
MASKED_TOKENS = 8
SERVED_TOKENS = 32
MIB = 1 << 20


def write(folder: Path, config: dict[str, Any], *, score: bool = False, seed: int = 0) -> int:
    """Write a model of this configuration, bfloat16, one shard a layer; with `score` its network as that of a Qwen3
    reward model. Returns the tensors' bytes."""
    ids = write_tokenizer(folder, TOKENIZER_SIZE, order_seed=int(score), mask=not score)
    family = family_of(config)
    with torch.device("meta"):
        expected = family(family.read_config(config)).state_dict()
    raw = config | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ids[SPECIAL["eos_token"]])
    if score:
        expected["score.weight"] = torch.empty(1, raw["hidden_size"], device="meta")
        raw |= {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3", "id2label": {"0": "R"}}
    else:
        raw["mask_token_id"] = ids[SPECIAL["mask_token"]]
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    shards: dict[str, list[str]] = {}
    for name in expected:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name.split(".")[-2], []).append(name)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.ones(expected[name].shape, dtype=torch.bfloat16)
            if tensor.ndim == 2:
                tensor.normal_(0.0, raw["initializer_range"], generator=generator)
            tensors[name] = tensor
            total += tensor.numel() * tensor.element_size()
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def step(loaded: LoadedDiffusionModel, reward: RewardModel) -> float:
    """One EntRGi denoising step that reveals a small canvas whole; returns the final reward."""
    runner = Runner(loaded, {reward.name: reward})
    job = Job(
        id="full-size",
        prompt_ids=tuple(range(100, 100 + PROMPT_TOKENS)),
        conversation=(Message("user", "How large is this?"),),
        sampling=SamplingParams(max_tokens=MASKED_TOKENS),
        diffusion=DiffusionParams(steps=1),
        guidance=GuidanceParams("entrgi", (WeightedReward(reward.name),), gradient_steps=1),
    )
    value = run_to_end(runner, [job])[job.id].trajectories[0].reward
    if value is None or not math.isfinite(value):
        raise RuntimeError("the guided step gave no finite reward")
    return value


async def serve(folder: Path, dtype: str) -> None:
    """Start the server on a pair, send it a request without guidance and one with, print what they took."""
    flags = ["--model", str(folder), "--reward-model", f"rm={folder / 'rm'}", "--dtype", dtype, "--no-spare-worker"]
    figures: dict[str, Any] = {"bench": "full_size_served", "dtype": dtype, "tokens": SERVED_TOKENS}
    started = time.perf_counter()
    async with served(flags) as url, httpx.AsyncClient(base_url=url, timeout=3600) as http:
        figures["ready_seconds"] = round(time.perf_counter() - started, 2)
        for method in ("none", "entrgi"):
            asked = {"messages": [{"role": "user", "content": "How large is this?"}], "max_tokens": SERVED_TOKENS}
            asked |= {"guidance": method, "best_of": 1, "ignore_eos": True, "seed": 0}
            started = time.perf_counter()
            answer = (await http.post("/v1/chat/completions", json=asked)).raise_for_status().json()
            figures[f"{method}_seconds"] = round(time.perf_counter() - started, 2)
            print(f"{method}: {figures[f'{method}_seconds']} s, reward {answer['choices'][0]['reward']}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the largest of the server's processes
    print(json.dumps(figures | {"peak_rss_bytes": peak, "torch": torch.__version__}))


def memory_bytes() -> dict[str, int]:
    """This process's resident memory: now (own pages, pages of mapped files) and at its peak."""
    keys = {"RssAnon": "anonymous", "RssFile": "mapped", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in keys:
            found[keys[key]] = int(value.split()[0]) * 1024
    return found


def measure(folder: Path, dtype: torch.dtype) -> None:
    """Load in `dtype` and run in this process; print the table and the JSON line."""
    stages: list[dict[str, Any]] = []

    def stage(name: str, started: float) -> None:
        stages.append({"stage": name, "seconds": round(time.perf_counter() - started, 2), **memory_bytes()})

    stage("process, imports", time.perf_counter())
    started = time.perf_counter()
    loaded = load_diffusion_model(folder, dtype=dtype, device="cpu")
    stage("load_diffusion_model", started)
    started = time.perf_counter()
    reward = load_reward_model(
        find_classifier("rm", folder / "rm"),
        diffusion_tokenizer=loaded.tokenizer,
        diffusion_vocab_size=loaded.model.vocab_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    stage("load_reward_model", started)
    for name in ("first guided step", "second guided step"):
        started = time.perf_counter()
        value = step(loaded, reward)
        stage(name, started)
    checkpoint = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    columns = {"anonymous": "own MiB", "mapped": "mapped MiB", "peak": "peak MiB"}
    print(f"{'stage':<24}{'seconds':>9}" + "".join(f"{title:>12}" for title in columns.values()))
    for row in stages:
        print(f"{row['stage']:<24}{row['seconds']:>9}" + "".join(f"{row[key] // MIB:>12}" for key in columns))
    print(f"checkpoint {checkpoint // MIB} MiB, reward {value:.3f}")
    peak = stages[-1]["peak"]
    stored = [*stored_tensors(folder).values(), *stored_tensors(folder / "rm").values()]
    weights = sum(math.prod(tensor.shape) for tensor in stored) * dtype.itemsize
    result: dict[str, Any] = {"bench": "full_size", "dtype": str(dtype).removeprefix("torch.")}
    result |= {"checkpoint_bytes": checkpoint, "weights_bytes": weights, "peak_rss_bytes": peak}
    result["peak_over_weights"] = round(peak / weights, 3)
    print(json.dumps(result | {"torch": torch.__version__, "threads": torch.get_num_threads(), "stages": stages}))


def main() -> None:
    """Write the checkpoint, then measure in a process that has not held it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="serve a pair of 0.6B models")
    parser.add_argument("--layers", type=int, default=2, help="of the cut Dream")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="only load and run this checkpoint")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure, getattr(torch, arguments.dtype))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.serve:
            write(Path(folder), QWEN3_0_6B)
            write(Path(folder) / "rm", QWEN3_0_6B, score=True, seed=1)
            asyncio.run(serve(Path(folder), arguments.dtype))
            return
        started = time.perf_counter()
        total = write(Path(folder), DREAM_7B | {"num_hidden_layers": arguments.layers})
        write_reward(Path(folder) / "rm", REWARD_1_7B_CUT, dtype=torch.bfloat16)
        print(
            f"wrote {total // MIB} MiB of Dream and a reward model in {time.perf_counter() - started:.0f} s", flush=True
        )
        command = [sys.executable, "-m", "benchmarks.full_size", "--dtype", arguments.dtype, "--measure", folder]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
