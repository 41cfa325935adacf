"""Philox4x32-10 against the known answers of its authors, and the keys' layout."""

import numpy as np
import pytest
import torch

from kernels.random import philox, row_keys, uniform

# Random123 (D. E. Shaw Research), tests/kat_vectors, the three lines of "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_known_answers(line):
    words = [torch.tensor([int(word, 16)]) for word in line.split()]
    result = philox(tuple(words[:4]), tuple(words[4:6]))
    assert [int(word) for word in result] == [int(word) for word in words[6:]]
    if line.startswith("ffffffff"):  # a seed past 2^63 arrives in two's complement
        keys = torch.tensor([[-1, -1, 0xFFFFFFFF, 0xFFFFFFFF]])
        assert float(uniform(keys, 0)) == ((int(words[6]) << 32 | int(words[7])) >> 11) / 2**53


def test_keys_are_counter_and_seed():
    """`uniform` is the first two output words for key = seed and the documented counter."""
    seed = 0x299F31D0A4093822
    keys = row_keys(*(torch.tensor([v]) for v in (seed, 0x1319, 0x8A2E, 0x05A308D3, 0x7073, 0x243F6A88)))
    when = (0x7073 << 8) | 0x44
    assert when < 2**32
    counter = [torch.tensor([v]) for v in (0x243F6A88, 0x05A308D3, 0x13198A2E, when)]
    high, low, _, _ = philox(tuple(counter), (torch.tensor([0xA4093822]), torch.tensor([0x299F31D0])))
    assert float(uniform(keys, 0x44)) == ((int(high) << 32 | int(low)) >> 11) / 2**53


def test_uniform_over_positions_rounds_and_seeds():
    """Flat over [0, 1), and no two of who / when give the same number."""
    positions = torch.arange(20000)
    zero = torch.zeros_like(positions)
    columns = {"seed": zero, "prompt": zero, "trajectory": zero, "step": zero, "inner": zero, "position": zero}
    draws = []
    for name in columns:
        value = positions % 250 if name == "inner" else positions
        draws.append(uniform(row_keys(**{**columns, name: value + 1}), 0)[:250])
    draws.append(torch.cat([uniform(row_keys(**columns), round_)[:1] for round_ in range(65)]))
    everything = torch.cat(draws)
    assert len(everything.unique()) == len(everything)

    u = uniform(row_keys(**{**columns, "position": positions}), 0).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    chi_square = float(((counts - 200.0) ** 2 / 200.0).sum())
    assert 60 < chi_square < 150  # 99 degrees of freedom: 1e-3 quantiles at 60 and 148
