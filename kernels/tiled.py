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

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kernels.adam import Trail, direction
from kernels.ops import FilteredStats, Guided, Mixed, RowParams, RowStats, Term
from kernels.settings import settings

TILE = 1024  # columns a tile, unless a backend says otherwise


class Tiles(NamedTuple):
    """Sums over each tile of each row, (N, T): with d = phi - maximum, s = sum exp(d) and t = sum d exp(d) at
    temperature 1, and the same with d / tau. An all -inf tile has zeros. Float64 on a CPU."""

    maximum: Tensor
    s_1: Tensor
    t_1: Tensor
    s_tau: Tensor
    t_tau: Tensor


class Rows(NamedTuple):
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
    slab_elements = 1 << 20  # elements of the (N, columns) buffer between a product and its elementwise part

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        super().__init__(logits, params, updates)
        self.trail = Trail()
        shape = 5, self.rows, -(-self.vocab_size // self.tile)
        self.tiles = Tiles(*torch.empty(shape, dtype=self.tile_dtype, device=logits.device).unbind(0))
        self._prepare()
        self._row_sums()
        self._refresh()

    # -- the arithmetic of one slab, which backends supply ------------------------------------------------------------

    def _prepare(self) -> None:
        """Sets up what a backend holds beside the tiles; called once for every new state."""

    @abstractmethod
    def _row_sums(self) -> None:
        """Fills `self.tiles` for phi_0."""

    @abstractmethod
    def _weights(self, start: int, out: Tensor) -> Tensor | None:
        """exp((phi - maximum) / tau) at columns from `start` on, into `out` (N, columns) of any dtype. A backend whose
        own `_mix` normalises by the sums (N,) of what was written returns them."""

    @abstractmethod
    def _step(self, slope: Tensor, offset: Tensor, start: int, after: Trail) -> None:
        """One Adam step on columns from `start` on: `slope` (N, columns), of any dtype, is g @ E.T there, `offset` (N,)
        is c. Writes what is new in `after` and the new phi's tiles. `slope` may be overwritten."""

    # -- shared -------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Brings `sums` and `stats` up to date with `tiles`."""
        self.sums, entropy_1, entropy_tau = combine(self.tiles, self.params.tau)
        tau = self.params.tau.double()
        lse_1 = self.sums.maximum + self.sums.s_1.log()
        lse_tau = self.sums.maximum / tau + self.sums.s_tau.log()
        lse_1, lse_tau, entropy_1, entropy_tau = (x.to(self.dtype) for x in (lse_1, lse_tau, entropy_1, entropy_tau))
        self.stats = RowStats(lse_1, lse_tau, entropy_1, entropy_tau, self._argmax())

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

    def _part(self, rows: slice) -> Self:
        part = super()._part(rows)
        part.trail, part.tiles = self.trail.part(rows), Tiles(*(sums[rows] for sums in self.tiles))
        part._prepare()
        part._refresh()
        return part

    def phi(self) -> Tensor:
        return self._compose(lambda tensor: tensor, None)

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

    def _slabs(self) -> Iterator[tuple[int, int]]:
        """Column ranges: whole tiles up to `slab_elements`; what is left of the last tile is a range by itself."""
        width = max(1, self.slab_elements // (self.rows * self.tile)) * self.tile
        whole = self.vocab_size // self.tile * self.tile
        for start in range(0, whole, width):
            yield start, min(start + width, whole)
        if whole < self.vocab_size:
            yield whole, self.vocab_size

    def _buffers(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Each slab's columns and room for it, (N, columns), in the same memory every time."""
        slabs = list(self._slabs())
        widest = max(stop - start for start, stop in slabs)
        room = torch.empty(self.rows * widest, dtype=dtype, device=self.logits.device)
        for start, stop in slabs:
            yield start, stop, room[: self.rows * (stop - start)].view(self.rows, stop - start)

    def _mix(self, table: Tensor, tokens: Tensor, w: Tensor) -> Mixed:
        soft = torch.zeros(self.rows, table.shape[1], dtype=self.dtype, device=table.device)
        for start, stop, weights in self._buffers(self._product_dtype(table)):
            self._weights(start, weights)
            self._product(soft, weights, table[start:stop], add=True)
        soft /= self.sums.s_tau.to(self.dtype)[:, None]
        hard = table[tokens].to(self.dtype)
        return Mixed(embeds=torch.addcmul(soft, w.to(self.dtype)[:, None], hard.sub_(soft)), soft=soft)

    def _product_dtype(self, table: Tensor) -> torch.dtype:
        """In which dtype a product with this table takes its factors: its own 16 bits where the device multiplies them
        natively, else the compute dtype."""
        native = table.dtype in (torch.bfloat16, torch.float16) if table.is_cuda else settings().bfloat16
        narrow = table.dtype == torch.bfloat16 or table.is_cuda
        return table.dtype if native and narrow and self.dtype == torch.float32 else self.dtype

    def _product(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        """out = a @ b, or out += a @ b, of factors in the dtype that `_product_dtype` says for b; a product of 16-bit
        ones is summed in float32, and on a CPU rounded to 16 bits."""
        b = b.to(a.dtype)
        if out.is_cuda and out.dtype != a.dtype:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(add), out=out)
        elif out.dtype == a.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        else:
            out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))

    def _update(self, terms: Sequence[Term]) -> None:
        after = self._next_trail()
        gs = [term.g.to(self.dtype) for term in terms]
        offset = torch.zeros_like(self.params.tau)
        for term, g in zip(terms, gs, strict=True):
            offset += (g * term.soft.to(self.dtype)).sum(-1)
        gs = [g.to(self._product_dtype(term.table)) for g, term in zip(gs, terms, strict=True)]
        # On a CPU a product of 16-bit factors is of 16 bits; several are summed in the compute dtype.
        rounded = len(gs) == 1 and gs[0].device.type == "cpu"
        for start, stop, slope in self._buffers(gs[0].dtype if rounded else self.dtype):
            for index, (g, term) in enumerate(zip(gs, terms, strict=True)):
                self._product(slope, g, term.table[start:stop].T, add=index > 0)
            self._step(slope, offset, start, after)
        self._follow(after)

    def _next_trail(self) -> Trail:
        """The trail that the coming update writes."""
        last = self.updates + 1 == self.expected_updates
        shape = self.logits.shape
        return self.trail.after(self.updates + 1, last, lambda: self.logits.new_empty(shape, dtype=self.dtype))

    def _follow(self, after: Trail) -> None:
        """What an update has written is the state now."""
        self.trail = after
        self._refresh()


class CompiledState(TiledState):
    """What backends with compiled passes share: parameters as float32 columns that a pass reads by address, and the
    memory into which it writes what it finds."""

    def __init__(self, logits: Tensor, params: RowParams, updates: int | None) -> None:
        if logits.ndim == 2 and logits.stride(-1) != 1:
            logits = logits.contiguous()
        super().__init__(logits, params, updates)

    def _prepare(self) -> None:
        params, like = self.params, self.tiles.maximum
        self._tau, self._top_p, self._eta = (x.float().contiguous() for x in (params.tau, params.top_p, params.eta))
        self._top_k, self._greedy = params.top_k.contiguous(), params.greedy.to(torch.uint8).contiguous()
        sums = like.new_empty(2, self.rows, dtype=torch.float64)
        self.sums = Rows(like.new_empty(self.rows), sums[0], sums[1], like.new_empty(like.shape))
        self._top: Tensor | None = None  # the argmax, once it is known

    def _refresh(self) -> None:
        out = torch.empty(4, self.rows, device=self.logits.device)  # new ones: earlier statistics stay as they were
        self._top = torch.empty(self.rows, dtype=torch.long, device=self.logits.device)
        self.stats = RowStats(out[0], out[1], out[2], out[3], self._top)
        self._combine(out)

    @abstractmethod
    def _combine(self, out: Tensor) -> None:
        """Fills `sums`, `_top` and `out` (4, N), the other statistics in the order of `RowStats`, from the tiles."""

    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor:
        tokens = torch.empty(len(keys), dtype=torch.long, device=keys.device)
        rows = None if rows is None else rows.contiguous()
        self._draw_into(tokens, keys.contiguous(), rows, -1 if never is None else never)
        return tokens

    @abstractmethod
    def _draw_into(self, out: Tensor, keys: Tensor, rows: Tensor | None, never: int) -> None:
        """Fills out (n,) with tokens; `never` is -1 where every id may be drawn."""

    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats:
        out = torch.empty(3, len(tokens), device=tokens.device)
        self._filtered_into(out, tokens.contiguous(), None if rows is None else rows.contiguous())
        return FilteredStats(*out.unbind(0))

    @abstractmethod
    def _filtered_into(self, out: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        """Fills out (3, n) in the order of `FilteredStats`."""
