"""Backend "torch": the sort-free operations in plain torch, for any device; the fallback of the compiled backends.

Elementwise work is done in blocks of rows small enough to stay in a core's cache, which also bounds the temporaries.
A token is drawn by inverse CDF over the tile sums, then verified: it is kept when the mass (and the count) of what
ranks above it is small enough, which takes one pass and no sort. The few rows whose first draw is rejected go through
the rule as `kernels.reference` writes it, except that their last kept rank comes from a histogram and a sort of the one
bin in which the cut lies (`last_kept`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.adam import Trail, advance, direction, moments
from kernels.ops import FilteredStats, RowParams
from kernels.random import uniform
from kernels.reference import best, draw, first_exceeding
from kernels.tiled import TILE, TiledState

BINS = 2048  # of the rank histogram
BINS_PER_NEPER = 64.0  # bins for a factor e of probability


def tile_sums(values: Tensor) -> Tensor:
    """Sums (b, tiles) float64 over the tiles of values (b, columns), a whole number of tiles or part of one."""
    width = min(TILE, values.shape[-1])
    return values.view(values.shape[0], -1, width).sum(-1).double()


def ranks_above(phi: Tensor, value: Tensor, token: Tensor, start: int) -> Tensor:
    """Which of phi (n, columns), ids from `start` on, rank above a token (n,) of this value: larger, or equal with a
    lower id."""
    ids = torch.arange(start, start + phi.shape[-1], device=phi.device)
    return (phi > value[:, None]) | ((phi == value[:, None]) & (ids < token[:, None]))


def last_kept(phi: Tensor, maximum: Tensor, params: RowParams) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest rank that the filters keep in each row of phi (b, V), as (value (b,), id (b,)), and the weights
    exp((phi - maximum) / tau) (b, V) in float64.

    A histogram over (maximum - phi) / tau, monotone in rank, gives the mass and the count before each bin; only the
    bin in which the kept prefix ends is sorted.
    """
    z = ((maximum[:, None] - phi) / params.tau[:, None]).double().nan_to_num(torch.inf)
    weights = z.neg().exp()
    limit = torch.where(params.top_p >= 1, torch.inf, params.top_p.double() * weights.sum(-1))
    bins = (z * BINS_PER_NEPER).clamp(0, BINS - 1).long()
    histogram = torch.zeros(2, len(phi), BINS, dtype=torch.float64, device=phi.device)
    mass = histogram[0].scatter_add_(-1, bins, weights)
    count = histogram[1].scatter_add_(-1, bins, torch.ones_like(weights))
    mass_before = mass.cumsum(-1) - mass
    count_before = count.cumsum(-1) - count
    # The first token is kept whatever top_p says, so a row always has a cut; bins are visited from the last to it.
    open_ = (count > 0) & (count_before < params.top_k[:, None]) & (mass_before <= limit[:, None])
    open_ |= (count > 0) & (count_before == 0)
    cut = BINS - 1 - open_.flip(-1).to(torch.uint8).argmax(-1)

    row, token = torch.nonzero(bins == cut[:, None], as_tuple=True)  # ascending ids in each row
    order = torch.sort(phi[row, token], descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    row, token = row[order], token[order]
    size = torch.bincount(row, minlength=len(phi))
    begin = size.cumsum(0) - size
    w = weights[row, token]
    running = torch.cat([w.new_zeros(1), w.cumsum(0)])
    before = mass_before.gather(-1, cut[:, None])[:, 0] - running[begin]
    rank = torch.arange(len(row), device=phi.device) - begin[row] + count_before.gather(-1, cut[:, None])[row, 0]
    keep = (before[row] + running[:-1] <= limit[row]) & (rank < params.top_k[row])
    kept = torch.zeros_like(size).scatter_add_(0, row, (keep | (rank == 0)).long())
    end = begin + kept.clamp_min(1) - 1
    return phi[row[end], token[end]], token[end], weights


def kept_mask(phi: Tensor, value: Tensor, token: Tensor) -> Tensor:
    """Which of phi (b, V) rank at or above (value, id) (b,)."""
    return ranks_above(phi, value, token + 1, 0)


class TorchState(TiledState):
    """Blocks of rows in plain torch."""

    backend = "torch"
    block_elements = 1 << 18  # elements of one elementwise temporary
    wide_block_elements = 1 << 17  # the same where temporaries are float64 and many

    def _blocks(self, rows: int, columns: int, elements: int | None = None) -> Iterator[slice]:
        """Ranges of rows, one after another, of at most `elements` elements."""
        height = max(1, (elements or self.block_elements) // columns)
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def _row_sums(self) -> None:
        for start, stop in self._slabs():
            for block in self._blocks(self.rows, stop - start):
                self._set_tiles(self._block(block, start, stop), block, start)

    def _set_tiles(self, phi: Tensor, index: slice | Tensor, start: int) -> None:
        """Tile sums of phi (b, columns), which is read only."""
        width = min(TILE, phi.shape[-1])
        tiled = phi.reshape(phi.shape[0], -1, width)
        maximum = tiled.amax(-1, keepdim=True)
        # -inf minus an all -inf tile's maximum is NaN, and 0 times -inf too: both must count as nothing.
        d = (tiled - maximum.clamp_min(torch.finfo(self.dtype).min)).clamp_min_(-1e30)
        span = slice(start // TILE, start // TILE + tiled.shape[1])
        self.tiles.maximum[index, span] = maximum[..., 0].double()
        weight = d.exp()
        self.tiles.s_1[index, span] = weight.sum(-1).double()
        self.tiles.t_1[index, span] = weight.mul_(d).sum(-1).double()
        d = d.div_(self.params.tau[index][:, None, None]).clamp_min_(-1e30)
        weight = torch.exp(d, out=weight)
        self.tiles.s_tau[index, span] = weight.sum(-1).double()
        self.tiles.t_tau[index, span] = weight.mul_(d).sum(-1).double()

    def _weights(self, start: int, out: Tensor) -> None:
        columns = out.shape[1]
        for block in self._blocks(self.rows, columns):
            torch.exp(self._exponent(self._block(block, start, start + columns), block), out=out[block])

    def _exponent(self, phi: Tensor, index: slice | Tensor) -> Tensor:
        """(phi - maximum) / tau; a new tensor."""
        maximum = self.sums.maximum[index].to(self.dtype)
        return (phi - maximum[:, None]).div_(self.params.tau[index][:, None])

    def _step(self, slope: Tensor, offset: Tensor, start: int, after: Trail) -> None:
        columns = slope.shape[1]
        stop = start + columns
        for block in self._blocks(self.rows, columns):
            phi = self._block(block, start, stop)
            scale = (self.params.tau[block] * self.sums.s_tau[block].to(self.dtype)).reciprocal()
            gradient = self._exponent(phi, block).exp_()
            gradient.mul_(slope[block].to(self.dtype).sub_(offset[block, None])).mul_(scale[:, None])
            step = self._adam(gradient, block, start, stop, after)
            step.mul_(self.params.eta[block][:, None]).add_(phi)
            if after.phi is not None:
                after.phi[block, start:stop] = step
            self._set_tiles(step, block, start)

    def _adam(self, gradient: Tensor, index: slice, start: int, stop: int, after: Trail) -> Tensor:
        """Adam's direction for one block; its gradient or moments are written where `after` has them."""
        trail, place = self.trail, (index, slice(start, stop))
        if trail.m is not None and trail.v is not None:
            return advance(trail.m[place], trail.v[place], gradient, self.updates + 1)
        gradients = [*(g[place] for g in trail.gradients), gradient]
        result = direction(gradients)
        if after.newest is not None:
            after.newest[place] = gradient
        if after.m is not None and after.v is not None:
            after.m[place], after.v[place] = moments(gradients, corrected=False)
        return result

    # -- drawing --------------------------------------------------------------------------------------------------

    def _draw(self, keys: Tensor, rows: Tensor | None, never: int | None) -> Tensor:
        index = torch.arange(self.rows, device=keys.device) if rows is None else rows
        params = self.params.select(index)
        total = self.sums.s_tau[index]
        first = self.stats.argmax[index] if never is None else self._best_other(never, index)
        # One kept token needs no draw: the second is cut when the first alone exceeds top_p.
        certain = params.greedy | (params.top_k == 1) | ((1 / total > params.top_p) & (params.top_p < 1))
        tokens = torch.where(certain, first, self._invert(uniform(keys, 0), index))
        mass, count = self._above(tokens, rows)
        limit = torch.where(params.top_p >= 1, torch.inf, params.top_p.double() * total)
        kept = ((mass <= limit) | (count == 0)) & (count < params.top_k)
        accepted = certain | (kept if never is None else kept & (tokens != never))
        rejected = torch.nonzero(~accepted)[:, 0]
        for block in self._blocks(len(rejected), self.vocab_size, self.wide_block_elements):
            some = rejected[block]
            phi = self._block(index[some], 0, self.vocab_size)
            value, token, _ = last_kept(phi, self.sums.maximum[index[some]].to(self.dtype), params.select(some))
            tokens[some] = draw(phi, params.select(some), keys[some], never, kept_mask(phi, value, token))
        return tokens

    def _best_other(self, never: int, index: Tensor) -> Tensor:
        """The lowest id of the largest value beside `never` in rows `index` (n,)."""
        tokens = self.stats.argmax[index]
        again = torch.nonzero(tokens == never)[:, 0]
        for block in self._blocks(len(again), self.vocab_size, self.wide_block_elements):
            some = again[block]
            tokens[some] = best(self._block(index[some], 0, self.vocab_size), never)
        return tokens

    def _invert(self, u: Tensor, index: Tensor) -> Tensor:
        """The first id (n,) whose cumulative unfiltered mass exceeds u (n,) times the total."""
        mass = self.sums.mass[index]
        cumulative = mass.cumsum(-1)
        tile = first_exceeding(cumulative, u)
        phi, columns = self._tile_values(tile, index)
        weights = self._exponent(phi, index).exp_().double().cumsum(-1)
        before = (cumulative - mass).gather(-1, tile[:, None])[:, 0]
        # The tile's weights are summed anew, so its end may differ from its mass in the last bit: the clamp in
        # `first_exceeding` then takes the last id with any mass.
        wanted = (u * cumulative[:, -1] - before) / weights[:, -1]
        place = first_exceeding(weights, wanted.clamp(0, 1))
        # Only a row that is not numbers can point past the end.
        return columns.gather(-1, place[:, None])[:, 0].clamp_max(self.vocab_size - 1)

    def _above(self, tokens: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mass exp((phi - maximum) / tau), float64, and count of what ranks above the tokens (n,)."""
        mass = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        count = torch.zeros_like(mass)
        index = torch.arange(self.rows, device=tokens.device) if rows is None else rows
        value = self._compose(lambda tensor: tensor[index, tokens][:, None], index)[:, 0]
        for start, stop in self._slabs():
            for block in self._blocks(len(tokens), stop - start):
                some = block if rows is None else rows[block]
                phi = self._block(some, start, stop)
                above = ranks_above(phi, value[block], tokens[block], start)
                mass[block] += tile_sums(self._exponent(phi, some).exp_().mul_(above)).sum(-1)
                count[block] += above.sum(-1)
        return mass, count

    def _filtered_stats(self, tokens: Tensor, rows: Tensor | None) -> FilteredStats:
        index = torch.arange(self.rows, device=tokens.device) if rows is None else rows
        columns = [torch.empty(len(index), dtype=self.dtype, device=tokens.device) for _ in range(3)]
        for block in self._blocks(len(index), self.vocab_size, self.wide_block_elements):
            some = index[block]
            phi = self._block(some, 0, self.vocab_size)
            maximum = self.sums.maximum[some].to(self.dtype)
            value, token, weights = last_kept(phi, maximum, self.params.select(some))
            weights *= kept_mask(phi, value, token)
            p = weights / weights.sum(-1, keepdim=True)
            columns[0][block] = -torch.special.entr(p).sum(-1).to(self.dtype)
            columns[1][block] = p.gather(-1, tokens[block, None])[:, 0].to(self.dtype)
            top = p.topk(min(2, self.vocab_size), dim=-1).values
            columns[2][block] = (top[:, 0] - (top[:, 1] if self.vocab_size > 1 else 0)).to(self.dtype)
        return FilteredStats(*columns)
