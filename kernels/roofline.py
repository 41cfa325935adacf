"""Fused or library products on a GPU: the rule, and its arithmetic.

An inner step multiplies twice with a reward model's table E (V, D): weights (N, V) @ E on the way to the model, and
g (N, D) @ E.T on the way back. Both ways (`kernels.gpu.ops`, `kernels.gpu.fused`) are estimated as a roofline, in
seconds, with B bytes a second from memory, F FLOP a second of a library's product, and factors of 16 bits:

    a product      max(2 N V D / F, its bytes / B); in Triton F is less by `share`
    library        mix: product + (phi + 2) N V / B          phi is read, weights are written
                   update: product + (phi + 4 + 4) N V / B   the slope is read, phi is read, a gradient is written
    fused          mix: product + 8 P N D / B                P parts of the sum are written and read
                   update: product + (phi + 4 + 2) N V / B   no slope; the next mix's weights are written in passing
                   and 4/3 N V / B for the weights of the first of three steps

phi takes 2 bytes an element before the first update, 6 after it and 10 after the second: 6 in the mean of M = 3. Each
launch adds `LAUNCH`. N is what the budgets let through at once, so the choice is made when a server starts and never by
a batch. Fused is taken where its estimate is at most `MARGIN` above the library's: it sums a row the same way in every
batch. What a device really does is for `make gpu-check` to say: it measures both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BACKENDS = {"fused": "fused", "library": "triton"}
"""What computes each kind, by its name in the setting `kernels`."""
MARGIN = 0.10
LAUNCH = 4e-6
PHI = 6.0  # bytes an element
PARTS_COLUMNS = 16_384  # P D: about 128 programs for few rows (`kernels.gpu.fused`)


class Device(NamedTuple):
    """What a class of devices reaches: bytes a second, FLOP a second of a library's 16-bit product with sums in 32
    bits, and the share of it that a product in a Triton kernel reaches."""

    bytes: float
    flops: float
    share: float


DEVICES = {
    (8, 0): Device(1.7e12, 260e12, 0.85),  # A100
    (8, 6): Device(0.85e12, 130e12, 0.85),  # RTX 30 series, A10, A40
    (8, 9): Device(0.85e12, 150e12, 0.85),  # RTX 40 series, L4, L40
    (9, 0): Device(3.0e12, 790e12, 0.75),  # H100, H200
    (10, 0): Device(7.0e12, 1600e12, 0.6),  # B200
}
"""By least compute capability. Published peaks less what such code usually leaves of them: assumptions, not
measurements. Hopper and Blackwell reach theirs only with features that kernels for all of these do without."""


class Estimate(NamedTuple):
    """Seconds of an inner step's two products and all that goes with them."""

    fused: float
    library: float

    @property
    def takes(self) -> str:
        """Which is taken, by its name in the setting `kernels`."""
        return "fused" if self.fused <= (1 + MARGIN) * self.library else "library"


def estimate(capability: tuple[int, int], vocab_size: int, widths: Iterable[int], rows: int) -> Estimate:
    """Of N = `rows` with every table (V, D), D of `widths`, in turn."""
    device = DEVICES[max((known for known in DEVICES if known <= capability), default=min(DEVICES))]
    columns, fused, library = float(rows * vocab_size), 0.0, 0.0
    for width in widths:
        work, table = 2.0 * columns * width, 2.0 * vocab_size * width

        def product(share: float, moved: float, work: float = work) -> float:
            return max(work / (device.flops * share), moved / device.bytes)

        forth, back = table + 2 * columns, table + 4 * columns
        library += product(1, forth) + product(1, back) + ((PHI + 2) + (PHI + 8)) * columns / device.bytes + 16 * LAUNCH
        moved = (PHI + 6 + 4 / 3) * columns + 8 * PARTS_COLUMNS * rows
        fused += product(device.share, forth) + product(device.share, table) + moved / device.bytes + 5 * LAUNCH
    return Estimate(fused, library)
