"""The attention of packed rows behind cached prefixes as one C++ pass (`kernels.attention`): the CPU's way.

Prefixes are read where they lie: a row names its prefix and that one's parent, and nothing is gathered or padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels import attention
from server.rewards.varlen import Cached, chain


@dataclass(frozen=True, slots=True, eq=False)
class CppRows:
    """B rows behind `links`, the different cached pieces; `rows` are all queries, `lasts` each row's last one alone."""

    links: tuple[Cached, ...]
    rows: attention.Rows
    lasts: attention.Rows

    @classmethod
    def of(cls, prefixes: Sequence[Cached], lengths: Sequence[int]) -> CppRows:
        """Of rows of `lengths` own tokens, each behind its prefix."""
        numbers: dict[int, int] = {}
        links: list[Cached] = []
        pieces: list[list[int]] = []
        for prefix in prefixes:
            row = chain(prefix)
            for link in row:
                if id(link) not in numbers:
                    numbers[id(link)] = len(links)
                    links.append(link)
            pieces.append([numbers[id(link)] for link in row])
        own = [link.length - (link.parent.length if link.parent is not None else 0) for link in links]
        return cls(
            tuple(links),
            attention.Rows(lengths, lengths, pieces, own),
            attention.Rows([1] * len(lengths), lengths, pieces, own),
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, last: bool
    ) -> Tensor:
        """query (S, H, d), or with `last` (B, H, d), key and value (S, Hkv, d) -> the query's shape."""
        pieces = [(link.keys[layer], link.values[layer]) for link in self.links]
        rows = self.lasts if last else self.rows
        return attention.attend(query, key, value, rows, pieces, causal=True, scale=scale)
