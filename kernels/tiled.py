"""The sort-free way through a denoising step, shared by every fast backend: what is computed when, and from what.

Nothing of size (N, V) is ever made that is not Adam's state. Three facts carry it:

* **Tiles.** Softmax sums are kept per tile of `TILE` columns, each relative to the tile's own maximum, so one pass
  over phi gives everything a row needs: normalisers and entropies at both temperatures by combining tiles, and the
  cumulative distribution by which a draw finds its tile without touching the others. No maximum has to be known
  before the sums start, and small temperatures cannot overflow.
* **The gradient needs no second pass**: its mean under q is dot(g, soft), a number a row (algorithm.md, section 2).
* **Slabs.** Both matrix products run over slabs of columns, all rows in each product: soft += q[:, slab] @ E[slab],
  and (g @ E[slab].T) is consumed by the Adam step and the next phi's tile sums before the next slab is made.

What a backend supplies is the arithmetic on one slab: `_row_sums`, `_weights`, `_step`, `_draw`, `_filtered_stats`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.adam import Plan, Trail, direction, follow, plan_update
from kernels.ops import Guided, Mixed, RowParams, RowStats, Term

TILE = 1024  # columns a tile, unless a backend says otherwise


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sums over each tile of each row, (N, T): with d = phi - maximum, s = sum exp(d) and t = sum d exp(d) at
    temperature 1, and the same with d / tau. An all -inf tile has zeros. Float64 on a CPU."""

    maximum: Tensor
    s_1: Tensor
    t_1: Tensor
    s_tau: Tensor
    t_tau: Tensor

    @staticmethod
    def empty(rows: int, count: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tiles:
        """Uninitialised sums of N rows with T = `count` tiles each."""
        return Tiles(*torch.empty(5, rows, count, dtype=dtype, device=device).unbind(0))

    def select(self, rows: Tensor | slice | None) -> Tiles:
        """The tiles of some rows."""
        return self if rows is None else Tiles(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Rows:
    """What tiles say about rows, (N,) float64: the maximum, and sum exp(phi - maximum), at temperature 1 and tau."""

    maximum: Tensor
    s_1: Tensor
    s_tau: Tensor
    mass: Tensor  # (N, T): each tile's share of s_tau


def combine(tiles: Tiles, tau: Tensor) -> tuple[Rows, Tensor, Tensor]:
    """Row sums of tiles, and the entropies (N,) at temperature 1 and tau: H = log s - t / s.

    With delta = a tile's maximum minus the row's: s = sum s_j e^delta and t = sum (t_j + delta s_j) e^delta.
    """
    maximum = tiles.maximum.amax(-1)
    delta = tiles.maximum - maximum[:, None]
    delta = torch.where(delta == -torch.inf, 0.0, delta)  # an all -inf tile adds nothing: its sums are zero

    def sums(s_j: Tensor, t_j: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = delta.exp()
        mass = s_j * scale
        s = mass.sum(-1)
        t = ((t_j + delta * s_j) * scale).sum(-1)
        return mass, s, s.log() - t / s

    _, s_1, entropy_1 = sums(tiles.s_1, tiles.t_1, delta)
    mass, s_tau, entropy_tau = sums(tiles.s_tau, tiles.t_tau, delta / tau.double()[:, None])
    return Rows(maximum, s_1, s_tau, mass), entropy_1, entropy_tau


class TiledState(Guided):
    """phi as a trail of gradients (kernels.adam), its tiles, and the two products slab by slab."""

    tile = TILE
    tile_dtype = torch.float64
    products: torch.dtype = torch.float32  # of the two matrix products on a CPU; bfloat16 when asked for
    slab_elements = 1 << 20  # elements of the (N, columns) buffer between a product and its elementwise part

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        super().__init__(logits, params, updates)
        self.trail = Trail()
        self.tiles = Tiles.empty(self.rows, -(-self.vocab_size // self.tile), logits.device, self.tile_dtype)
        self._prepare()
        self._row_sums()
        self._refresh(None)

    # -- the arithmetic of one slab, which backends supply ------------------------------------------------------------

    def _prepare(self) -> None:
        """Sets up what a backend holds beside the tiles; called once for every new state."""

    @abstractmethod
    def _row_sums(self) -> None:
        """Fills `self.tiles` for phi_0."""

    @abstractmethod
    def _weights(self, start: int, out: Tensor) -> None:
        """exp((phi - maximum) / tau) of all rows at columns from `start` on, into `out` (N, columns)."""

    @abstractmethod
    def _step(self, slope: Tensor, offset: Tensor, start: int, plan: Plan, rows: Tensor | None) -> None:
        """One Adam step on columns from `start` on: `slope` (n, columns) is g @ E.T there, `offset` (n,) is c.
        Writes what `plan` names and the new phi's tiles. `slope` may be overwritten."""

    # -- shared -------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> RowStats:
        return self._stats

    def _refresh(self, rows: Tensor | None) -> None:
        """Brings `sums` and `stats` up to date with `tiles`; rows that were not updated keep meaningless entries."""
        self.sums, entropy_1, entropy_tau = combine(self.tiles, self.params.tau)
        tau = self.params.tau.double()
        lse_1 = self.sums.maximum + self.sums.s_1.log()
        lse_tau = self.sums.maximum / tau + self.sums.s_tau.log()
        lse_1, lse_tau, entropy_1, entropy_tau = (x.to(self.dtype) for x in (lse_1, lse_tau, entropy_1, entropy_tau))
        self._stats = RowStats(lse_1, lse_tau, entropy_1, entropy_tau, self._argmax())

    def _argmax(self) -> Tensor:
        """The lowest id of the largest value: the first tile that holds the maximum, then the first place in it."""
        tile = self.tiles.maximum.argmax(-1)
        phi, _ = self._tile_values(tile, None)
        return tile * self.tile + phi.argmax(-1)

    def _tile_values(self, tile: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi (n, tile) of one tile (n,) a row, -inf past the end of the vocabulary, and its column ids."""
        columns = tile[:, None] * self.tile + torch.arange(self.tile, device=tile.device)
        index = torch.arange(self.rows, device=tile.device) if rows is None else rows
        values = self._compose(lambda tensor: tensor[index[:, None], columns.clamp_max(self.vocab_size - 1)], index)
        return values.masked_fill(columns >= self.vocab_size, -torch.inf), columns

    def select(self, rows: Tensor | slice) -> Guided:
        chosen = copy.copy(self)
        chosen.logits, chosen.params = self.logits[rows], self.params.select(rows)
        chosen.trail, chosen.tiles = self.trail.select(rows), self.tiles.select(rows)
        chosen.partial = False
        chosen._prepare()
        chosen._refresh(None)
        return chosen

    def _phi(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self._compose(lambda tensor: tensor, None)
        return self._compose(lambda tensor: tensor[rows], rows)

    def _block(self, index: slice | Tensor, start: int, stop: int) -> Tensor:
        """phi at some rows and the columns start..stop; may be a view of the logits."""
        return self._compose(lambda tensor: tensor[index, start:stop], index)

    def _compose(self, take: Callable[[Tensor], Tensor], index: slice | Tensor | None) -> Tensor:
        """phi from the trail, at the elements that `take` takes; `index` names their rows."""
        if self.trail.phi is not None:
            return take(self.trail.phi)
        phi = take(self.logits).to(self.dtype)
        gradients: list[Tensor] = []
        eta = self.params.eta if index is None else self.params.eta[index]
        for gradient in self.trail.gradients:
            gradients.append(take(gradient).to(self.dtype))
            phi = direction(gradients).mul_(eta[:, None]).add_(phi)
        return phi

    def _slabs(self, rows: int) -> Iterator[tuple[int, int]]:
        """Column ranges: whole tiles up to `slab_elements`; what is left of the last tile is a range by itself."""
        width = max(1, self.slab_elements // (rows * self.tile)) * self.tile
        whole = self.vocab_size // self.tile * self.tile
        for start in range(0, whole, width):
            yield start, min(start + width, whole)
        if whole < self.vocab_size:
            yield whole, self.vocab_size

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(
            rows * max(stop - start for start, stop in self._slabs(rows)), dtype=self.dtype, device=self.logits.device
        )

    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
        soft = torch.zeros(self.rows, table.shape[1], dtype=self.dtype, device=table.device)
        buffer = self._buffer(self.rows)
        for start, stop in self._slabs(self.rows):
            weights = buffer[: self.rows * (stop - start)].view(self.rows, stop - start)
            self._weights(start, weights)
            self._accumulate(soft, weights, table[start:stop])
        soft /= self.sums.s_tau.to(self.dtype)[:, None]
        hard = table[tokens].to(self.dtype)
        return Mixed(embeds=torch.addcmul(soft, w.to(self.dtype)[:, None], hard.sub_(soft)), soft=soft)

    def _accumulate(self, total: Tensor, weights: Tensor, table: Tensor) -> None:
        """total (N, D) += weights (N, columns) @ table (columns, D)."""
        if self._tensor_cores(table):
            total += torch.mm(weights.to(table.dtype), table, out_dtype=torch.float32)
        elif self.products == torch.bfloat16:
            total += torch.mm(weights.bfloat16(), table.bfloat16())
        else:
            total.addmm_(weights.to(self.dtype), table.to(self.dtype))

    def _slope(self, terms: Sequence[Term], gs: Sequence[Tensor], start: int, stop: int, out: Tensor) -> None:
        """out (n, columns) = sum of g @ table[start:stop].T."""
        for index, (term, g) in enumerate(zip(terms, gs, strict=True)):
            table = term.table[start:stop]
            if self._tensor_cores(table):
                product = torch.mm(g.to(table.dtype), table.T, out_dtype=torch.float32)
                out.copy_(product) if index == 0 else out.add_(product)
            elif self.products == torch.bfloat16:
                product = torch.mm(g.bfloat16(), table.bfloat16().T)
                out.copy_(product) if index == 0 else out.add_(product)
            else:
                out.addmm_(g, table.to(self.dtype).T, beta=1.0 if index else 0.0)

    def _tensor_cores(self, table: Tensor) -> bool:
        """Whether a product with this table runs in its 16-bit dtype with float32 sums."""
        return table.is_cuda and table.dtype in (torch.bfloat16, torch.float16) and self.dtype == torch.float32

    def _update(self, terms: Sequence[Term], rows: Tensor | None) -> None:
        t = self.updates + 1
        last = rows is not None or t == self.expected_updates
        plan = plan_update(self.trail, t, last, self.dtype, self._new_gradient)
        gs = [term.g.to(self.dtype) for term in terms]
        offset = sum(
            ((g * term.soft.to(self.dtype)).sum(-1) for term, g in zip(terms, gs, strict=True)),
            start=torch.zeros_like(self.params.tau),
        )
        if rows is not None:
            gs, offset = [g[rows] for g in gs], offset[rows]
        count = self.rows if rows is None else len(rows)
        buffer = self._buffer(count)
        for start, stop in self._slabs(count):
            slope = buffer[: count * (stop - start)].view(count, stop - start)
            self._slope(terms, gs, start, stop, slope)
            self._step(slope, offset, start, plan, rows)
        self.trail = follow(self.trail, plan)
        self._refresh(rows)

    def _new_gradient(self) -> Tensor:
        return torch.empty(self.rows, self.vocab_size, dtype=self.dtype, device=self.logits.device)
