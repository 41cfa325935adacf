"""Two halves of a denoising step at the same time: the diffusion model of one while the reward model reads the other.

Each half runs in a host thread of its own, a *lane*, with its own CUDA stream. The trunk of the diffusion model, whose
graphs and tables are shared, has a third stream: one lane enters at a time, and events order what comes before and
behind it. Nothing else is shared but what is only read, so halves give what the whole would.

A tensor's memory goes back to the stream that it was made on. Whoever drops one that another stream has read must say
so (`drop_safely`); what was made before the lanes began is safe, because they begin and end with the caller's stream.
On a CPU there are threads and no streams: the same scheme, for tests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

R = TypeVar("R")

LANES = 2
LEAST_TRAJECTORIES = 2
LEAST_TOKENS = 512
"""Of a half, in the forward of the diffusion model: with fewer a GPU reads weights for longer than it computes, and
two halves would read them twice."""


class Lanes:
    """Runs one or two pieces of work at once. Made once a device; `least_tokens` and `least_trajectories` are what half
    of a step must have to be worth a lane."""

    def __init__(
        self, device: torch.device, *, least_tokens: int = LEAST_TOKENS, least_trajectories: int = LEAST_TRAJECTORIES
    ) -> None:
        self.least_tokens, self.least_trajectories = least_tokens, least_trajectories
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        self._trunk_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(LANES)]  # type: ignore[no-untyped-call]
            self._trunk_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._trunk = threading.Lock()
        self._second = ThreadPoolExecutor(max_workers=LANES - 1, thread_name_prefix="lane")

    def split(self, tokens: Sequence[int], costs: Sequence[float]) -> int | None:
        """Where to cut trajectories with so many canvas `tokens` into halves of like cost: how many are in the first
        half. None where a half would not be worth it."""
        if len(tokens) < 2 * self.least_trajectories:
            return None
        # The cut that leaves the two halves most alike, from those that leave enough trajectories in both.
        before = np.cumsum(costs)[self.least_trajectories - 1 : len(costs) - self.least_trajectories]
        cut = self.least_trajectories + int(np.abs(2 * before - sum(costs)).argmin())
        return cut if min(sum(tokens[:cut]), sum(tokens[cut:])) >= self.least_tokens else None

    def run(self, works: Sequence[Callable[[], R]]) -> list[R]:
        """What each of one or two pieces of work returned. If one raises, so does this, after the other is done."""
        caller = torch.cuda.current_stream(self._device) if self._streams else None
        others = [self._second.submit(self._in_lane, lane, work, caller) for lane, work in enumerate(works[1:], 1)]
        try:
            results = [self._in_lane(0, works[0], caller)]
        except BaseException:
            for other in others:
                if (error := other.exception()) is not None:  # waits for it
                    logger.error("the other lane failed too", exc_info=error)
            raise
        finally:
            wait(others)
            for stream in self._streams:
                caller.wait_stream(stream)  # type: ignore[union-attr]
        return results + [other.result() for other in others]

    def _in_lane(self, lane: int, work: Callable[[], R], caller: torch.cuda.Stream | None) -> R:
        if caller is None:
            return work()
        stream = self._streams[lane]
        with torch.cuda.stream(stream):  # and its device: a thread begins on the first one
            stream.wait_stream(caller)
            return work()

    def trunk(self, forward: Callable[[], Tensor]) -> Tensor:
        """What the trunk's `forward` returned; no other lane is in it meanwhile."""
        with self._trunk:
            if self._trunk_stream is None:
                return forward()
            here = torch.cuda.current_stream(self._device)
            self._trunk_stream.wait_stream(here)
            try:
                with torch.cuda.stream(self._trunk_stream):
                    out = forward()
            finally:
                here.wait_stream(self._trunk_stream)  # also where it fails: what it reads is about to be freed
        out.record_stream(here)
        return out


def drop_safely(tensors: Iterable[Tensor]) -> None:
    """To be called before tensors that another lane may have made are dropped, in the lane that read them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
