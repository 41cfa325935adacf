"""How much memory a denoising step takes, and the budgets that follow from what is free.

The model, upper bounds in bytes; e is the size of an activation, c of a number in arithmetic (8 for float64, else 4):

* A canvas token in the forward of the diffusion model (no gradients, so one block's tensors at a time) takes
  max(e (3 m + 2 d + 2 H s + Hkv s), e (2 d + 5 H s + 3 Hkv s) + 2 c H s) + (e + c) d, the MLP's and the attention's
  peak, with width d, H heads and Hkv key heads of s channels and MLP width m; and 2 e d until the step ends.
* A row of logits without guidance takes V (e + c / 2): the logits, and what a draw or a confidence needs of the row.
* A guided row takes V (e + c f) + 8 c D: the logits, Adam's state and work space, and embeddings of the reward model's
  width D. f is `STATE[backend]`, from docs/kernels.md: two (N, V) tensors are kept up to M = 3, three with more, where
  rows count for more (`budget.steered_rows`). Rows of smaller M leave the inner steps early, but in the same memory:
  they take no less.
* A token of its own in a guided pass of a reward model keeps of every block until the backward pass: the stream before
  both norms; q, k and v as they were projected, and as attention reads them; what it made of them; gate and up; in c
  bytes each the norms' scales and the attention's log-sums. That is layers (e (2 d + 3 H s + 4 Hkv s + 2 m) +
  c (H + 2)). To that comes what one block has under way, e (3 m + 2 d + 2 H s), and 8 e d for the embeddings and their
  gradient. Where the model does not run on our own layers (`models.frozen`) the modules keep about three times as much.
* A token of a cached conversation takes 2 layers Hkv s e as long as the job runs, and the same again for each
  trajectory during the pass, because keys and values are laid out a row; so in a pass it counts as that share of an
  own token.
* A token that a block-causal diffusion model keeps takes 2 (layers + 2) Hkv s e: a layer's keys and values are laid out
  a row for the time of its attention, in two steps.
* CUDA graphs hold what the largest of their passes takes, besides what other passes take (`graph_tokens`).
* Encoders (`rewards.encoder`) have no pass in a step: what theirs take between steps, of 8,192 tokens at most, a step's
  memory is free for. Their weights are loaded before it is asked what is free.

The memory that is free after loading, times `fraction`, less the graphs', is divided so: for cached tokens (the larger
kind) an eighth if there are reward models, half with a block-causal diffusion model; the rest for the forward, and,
because forward and guidance never run at the same time, the same rest for guidance, less the hidden states that stay.
Five reward-model tokens are provided for four guided rows: a fully masked answer and what its template adds. The
fraction that is left is a margin; what a CPU's allocator keeps (`keep_large_blocks`) comes out of it too. Two budgets
come of it: `largest`, what memory takes in one piece, and `shared`, which is capped, because larger batches than `CAPS`
make a step longer without making it cheaper. On a CPU they can even make it dearer: every inner step passes over phi
several times, and once phi has outgrown the last cache each pass comes from memory. So there as many rows are steered
at once as that cache holds of phi, c V bytes each, but at least `LEAST_STEERED`: with fewer the matrix products read
the head and the embedding tables too often.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from kernels.dispatch import choose
from server.budget import Budget
from server.models.base import DiffusionModel
from server.models.graphs import MOST_TOKENS
from server.rewards.reward_model import RewardModel
from server.types import DecoderShape
from server.wire.stats import resident_bytes

STATE = {"cpp": 2.4, "torch": 2.8, "triton": 2.3, "fused": 2.7, "reference": 11.0}
"""Peak (N, V) tensors of guidance beside the logits for M <= 3, by kernel backend."""

TOKENS_A_ROW = 5 / 4
"""Reward-model tokens provided for a guided row."""

GRAPH_SHARE = 1 / 8
"""Of the memory for steps, at most so much is the graphs'."""

CAPS = {
    "cpu": Budget(4_096, 2_048, 256, 4_096, 16_384, 262_144),
    "cuda": Budget(32_768, 16_384, 256, 16_384, 65_536, 4_194_304),
}
FIXED_BYTES = 64 << 20  # work space that does not grow with the batch
LAST_CACHE_BYTES = 32 << 20  # where the system does not say
LEAST_STEERED = 256  # rows; with half of them a guided step of the pair of `make bench` took a tenth longer
LEAST = 16  # of anything: with less the models would not have fitted

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = (1 << 31) - 1  # free memory at the heap's end that is not given back; the largest value there is

GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where a control group keeps its limit and use, and its entry of file pages not read lately: in v2, and in v1."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one of each thing takes."""

    token: float
    hidden: float
    logit_row: float
    guided_row: float
    phi_row: float
    reward_token: float
    cached_token: float
    cached_share: float

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        rewards: Iterable[RewardModel],
        *,
        block_causal: bool = False,
        kernels: str = "auto",
    ) -> Footprint:
        """Of a diffusion model and reward models, of which each figure is the largest one's. `kernels` is the setting.
        `cached_share` is how much of the memory is for cached tokens."""
        rewards = list(rewards)
        e, c = _sizes(model.activation_dtype)
        vocabulary = model.vocab_size
        backend = choose(model.device, model.activation_dtype)
        if backend == "triton" and kernels != "library" and rewards and e == 2:
            backend = "fused"  # takes more, and how many rows there are decides whether it is taken
        widest = max((reward.shape.hidden for reward in rewards), default=0)
        return cls(
            token=_forward_token(model.shape, e, c),
            hidden=2.0 * model.shape.hidden * e,
            logit_row=vocabulary * (e + c / 2),
            phi_row=float(vocabulary * c),
            guided_row=vocabulary * (e + c * STATE[backend]) + 8.0 * c * widest,
            reward_token=max((_own_token(reward) for reward in rewards), default=0.0),
            cached_token=max(
                _kept_token(model.shape, e) if block_causal else 0.0,
                *(_cached_token(reward) for reward in rewards),
                0.0,
            ),
            cached_share=1 / 2 if block_causal else 1 / 8 if rewards else 0.0,
        )

    def graph_tokens(self, free_bytes: float, fraction: float) -> int:
        """Own tokens of the largest pass for which graphs may hold memory."""
        most = GRAPH_SHARE * max(0.0, free_bytes * fraction - FIXED_BYTES)
        return min(MOST_TOKENS, int(most / max(self.token, self.reward_token)))

    def budgets(
        self, free_bytes: float, fraction: float, device: str, *, context_length: int, graph_tokens: int = 0
    ) -> tuple[Budget, Budget]:
        """(shared, largest) for that much free memory, of which graphs hold passes of `graph_tokens`."""
        pool = max(0.0, free_bytes * fraction - FIXED_BYTES - graph_tokens * max(self.token, self.reward_token))
        rewards = self.reward_token > 0
        step = pool * (1 - self.cached_share)
        tokens = int(step / (self.token + self.hidden))
        caps = CAPS.get(device, CAPS["cuda"])
        if device == "cpu":
            steered = max(LEAST_STEERED, int(last_cache_bytes() / self.phi_row))
            caps = replace(caps, guided_rows=min(caps.guided_rows, steered))
        guidance = step - min(tokens, max(caps.tokens, 2 * context_length)) * self.hidden
        rows = int(guidance / (self.guided_row + TOKENS_A_ROW * self.reward_token)) if rewards else 0
        cached = int((pool - step) / self.cached_token) if self.cached_token else 0
        sizes = (tokens, rows, caps.trajectories, int(guidance / self.logit_row), int(TOKENS_A_ROW * rows), cached)
        largest = Budget(*(max(LEAST, size) for size in sizes))
        return Budget(*map(min, astuple(largest), astuple(caps))), largest


def cached_share(model: RewardModel) -> float:
    """What a cached token takes in a pass of a reward model, as a share of a token of the row's own."""
    return _cached_token(model) / _own_token(model)


def free_bytes(device: torch.device, *, root: Path = Path("/")) -> int:
    """Memory that can still be had: the GPU's, with what torch holds unused, or the machine's as the kernel and the
    control groups (v1 and v2) of this process allow, whichever is less."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(_machine_bytes(root), *_group_bytes(root))


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds on its device: torch's allocator on a GPU, all of the process's on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()


def last_cache_bytes(*, root: Path = Path("/")) -> int:
    """Size of the largest cache that the first processor has or shares, as Linux tells it."""
    sizes = [LAST_CACHE_BYTES]
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()  # as 32768K
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(sizes[1:], default=LAST_CACHE_BYTES)


def keep_large_blocks(spare_bytes: float) -> bool:
    """Let the C library use freed blocks of a denoising step again. Returns whether it does: there must be
    `spare_bytes` for what the heap then holds, and the library must be one that can (glibc).

    glibc takes every block over 32 MiB fresh from the kernel and gives it back when freed, so each step would fault in
    its logits, gradients and work space page by page: some 4 to 8% of a guided step of the pair of `make bench`. The
    price: aligned blocks seldom fit exactly where the last one was, so before places repeat the heap may hold eight of
    the largest kind that is kept (seen: some). Hence a limit of 256 MiB, or an eighth of what is spare.
    """
    large = min(256 << 20, int(spare_bytes / 8))
    if large <= 32 << 20 or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, large)) and bool(library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def _machine_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of what the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) * 1024


def _group_bytes(root: Path) -> list[int]:
    """What each control group above this process leaves: its limit less its use. Pages of files that were not read
    lately count as used, but would be given up, so they do not count here."""
    left = [2**63]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in GROUP_FILES:
            continue
        limit, used, inactive = GROUP_FILES[controllers]
        # Inside a container the path may be the host's: then its own group is at the mount.
        group = Path(path.lstrip("/"))
        for folder in (root / "sys/fs/cgroup" / controllers / each for each in (group, *group.parents)):
            try:
                most = (folder / limit).read_text().strip()
                statistics = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                if most != "max":
                    left.append(int(most) - int((folder / used).read_text()) + int(statistics.get(inactive, 0)))
            except OSError:
                continue
    return left


def _sizes(dtype: torch.dtype) -> tuple[int, int]:
    return dtype.itemsize, 8 if dtype == torch.float64 else 4


def _forward_token(shape: DecoderShape, e: int, c: int) -> float:
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    mlp = e * (3 * shape.intermediate + 2 * shape.hidden + 2 * queries + keys)
    attention = e * (2 * shape.hidden + 5 * queries + 3 * keys) + 2 * c * queries
    return float(max(mlp, attention) + (e + c) * shape.hidden)


def _own_token(reward: RewardModel) -> float:
    shape, (e, c) = reward.shape, _sizes(reward.activation_dtype)
    passing = e * (3 * shape.intermediate + 2 * shape.hidden + 2 * shape.heads * shape.head_size)
    return float(kept_bytes(shape, e, c) * (1 if reward.written_out else 3) + passing + 8 * e * shape.hidden)


def kept_bytes(shape: DecoderShape, e: int, c: int) -> int:
    """What a pass of a reward model keeps of one own token in all of its blocks, see above."""
    heads = (3 * shape.heads + 4 * shape.key_heads) * shape.head_size
    return shape.layers * (e * (2 * shape.hidden + heads + 2 * shape.intermediate) + c * (shape.heads + 2))


def _kept_token(shape: DecoderShape, e: int) -> float:
    return 2.0 * (shape.layers + 2) * shape.key_heads * shape.head_size * e


def _cached_token(reward: RewardModel) -> float:
    shape = reward.shape
    return 2.0 * shape.layers * shape.key_heads * shape.head_size * _sizes(reward.activation_dtype)[0]
