"""Decays of a segment of chunks, as weights ≤ 1: no exponential of a positive number is ever formed.

With G_i the sum of a chunk's log decays up to and including token i, a pair i ≥ j weighs exp(G_i − G_j), the state
before the chunk is read with exp(G_i), and token j enters the state after it with exp(G_C − G_j).

Per head or per token, the pair weights are one ``[C, C]`` tile; differences are taken in float64, so that a gate of
−1000 does not cost its neighbours their digits. Per channel the weight stands inside the sum over channels. There each
chunk is halved again and again: for i in the later half and j in the earlier one, the weight is the product of
exp(sum from the middle to i) and exp(sum from j to the middle). The sums grow from the finest halves up, by adding
only, so nothing cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops.common import Segment, load, rows

FLOOR = -1e4  # stands for −inf: exp of it is 0, and differences of its sums stay finite


def block_diagonal(scores: Tensor, tokens: int, size: int, later: int, earlier: int) -> Tensor:
    """Of scores ``[P, m, C·ra, C·rb]``, in each diagonal block of 2·size tokens the quarter (row half, column half):
    a view ``[P, m, size·ra, size·rb, blocks]``."""
    blocks = tokens // (2 * size)
    ra, rb = scores.shape[2] // tokens, scores.shape[3] // tokens
    view = scores.view(*scores.shape[:2], blocks, 2, size * ra, blocks, 2, size * rb)
    return view.diagonal(0, 2, 5)[:, :, later, :, earlier]


def token_diagonal(scores: Tensor, tokens: int) -> Tensor:
    """Of scores ``[P, m, C·ra, C·rb]``, the blocks of a token with itself: a view ``[P, m, ra, rb, C]``."""
    ra, rb = scores.shape[2] // tokens, scores.shape[3] // tokens
    return scores.view(*scores.shape[:2], tokens, ra, tokens, rb).diagonal(0, 2, 4)


@dataclass(frozen=True)
class Weights:
    """Weights of one segment; `reverse` is for sums over later tokens instead of earlier ones.

    Args:
        pairs: ``[P, m, C, 1, C, 1]`` (leading dims may be 1), zero where a pair is not seen; None per channel.
        read, write: ``[P, m, C, 1, 1 or D]``, for reading the state before, and entering the state after; None is 1.
        total: ``[P, m, 1 or D]``, the decay over each chunk; None is 1.
        levels: per channel, for halves of 1, 2, 4, … tokens: (row weights, column weights), each ``[P, m, blocks, size, D]``.
    """

    reverse: bool
    pairs: Tensor | None = None
    read: Tensor | None = None
    write: Tensor | None = None
    total: Tensor | None = None
    levels: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def per_channel(self) -> bool:
        return self.pairs is None

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ_d a_i[d] b_j[d] weight_ij[d] for the pairs seen, else 0: tiles to ``[P·m, C·ra, C·rb]``."""
        (p, m, c, ra, _), rb = a.shape, b.shape[3]
        if self.pairs is not None:
            scores = torch.bmm(rows(a), rows(b).mT)
            scores.view(p, m, c, ra, c, rb).mul_(self.pairs)
            return scores
        scores = a.new_zeros(p, m, c * ra, c * rb)
        token_diagonal(scores, c).copy_((a @ b.mT).movedim(2, -1))
        for i, (row, column) in enumerate(self.levels):
            size = 1 << i
            x = self._half(a, size, later=not self.reverse) * row.unsqueeze(4)
            y = self._half(b, size, later=self.reverse) * column.unsqueeze(4)
            block = x.flatten(3, 4) @ y.flatten(3, 4).mT
            self._quarter(scores, c, size).copy_(block.movedim(2, -1))
        return scores.flatten(0, 1)

    def columns(self, scores: Tensor, c: Tensor) -> Tensor:
        """Σ_j scores_ij weight_ij[v] c_j[v] over the pairs seen: unweighted scores ``[P·m, C·ra, C·rb]`` and tiles to tiles.

        This is for decays of c's channels; the scores are overwritten.
        """
        p, m, tokens, rb, _ = c.shape
        scores = scores.view(p, m, scores.shape[1], tokens * rb)
        out = token_diagonal(scores, tokens).movedim(-1, 2) @ c
        ra = out.shape[3]
        for i, (row, column) in enumerate(self.levels):
            size = 1 << i
            y = (self._half(c, size, later=self.reverse) * column.unsqueeze(4)).flatten(3, 4)
            part = (self._quarter(scores, tokens, size).movedim(-1, 2) @ y).unflatten(3, (size, ra))
            self._half(out, size, later=not self.reverse).addcmul_(part, row.unsqueeze(4))
        return out

    @staticmethod
    def _half(x: Tensor, size: int, *, later: bool) -> Tensor:
        """The later or earlier halves of all blocks of 2·size tokens: a view ``[P, m, blocks, size, r, D]``."""
        p, m, tokens, group, width = x.shape
        return x.view(p, m, tokens // (2 * size), 2, size, group, width)[:, :, :, int(later)]

    def _quarter(self, scores: Tensor, tokens: int, size: int) -> Tensor:
        return block_diagonal(scores, tokens, size, int(not self.reverse), int(self.reverse))


class Decay:
    """The log decays of a whole call: none, per head ``[Hs]``, per token ``[B, N, Hs]`` or per channel ``[B, N, Hs, D]``."""

    def __init__(self, log_decay: Tensor | None, like: Tensor, heads: int, dtype: torch.dtype) -> None:
        self.log_decay, self.heads, self.dtype = log_decay, heads, dtype
        self.batch, self.device = like.shape[0], like.device
        self.per_channel = log_decay is not None and log_decay.dim() == 4
        self._same: dict[tuple[int, bool], Weights] = {}  # weights that all chunks of one size share

    def weights(self, segment: Segment, *, reverse: bool) -> Weights:
        """The weights of one segment."""
        g = self.log_decay
        if g is not None and g.dim() == 4:
            return self._channel(load(g, segment, self.heads, self.dtype), reverse)
        if g is not None and g.dim() == 3:
            return self._token(load(g[..., None], segment, self.heads, self.dtype)[..., 0, 0], reverse)
        key = (segment.size, reverse)
        if key not in self._same:
            if g is None:
                seen = torch.ones(segment.size, segment.size, dtype=self.dtype, device=self.device).tril_()
                self._same[key] = Weights(reverse, self._pairs(seen[None, None], reverse))
            else:
                self._same[key] = self._token(g.repeat(self.batch)[:, None, None].expand(-1, 1, segment.size), reverse)
        return self._same[key]

    @staticmethod
    def _pairs(weights: Tensor, reverse: bool) -> Tensor:
        return (weights.mT if reverse else weights)[:, :, :, None, :, None]

    def _token(self, g: Tensor, reverse: bool) -> Weights:
        """From g ``[P, m, C]``."""
        total = g.double().clamp(min=FLOOR).cumsum(-1)
        later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu_(1)
        pairs = (total[..., :, None] - total[..., None, :]).to(self.dtype).masked_fill_(later, -torch.inf).exp_()
        end = total[..., -1:]
        from_start, to_end = (x.to(self.dtype).exp()[..., None, None] for x in (total, end - total))
        read, write = (to_end, from_start) if reverse else (from_start, to_end)
        return Weights(reverse, self._pairs(pairs, reverse), read, write, end.to(self.dtype).exp())

    def _channel(self, g: Tensor, reverse: bool) -> Weights:
        """From g ``[P, m, C, 1, D]``, C a power of two."""
        p, m, tokens, _, width = g.shape
        from_start, to_end, total = g.clone(), torch.zeros_like(g), g.reshape(p, m, tokens, width)
        levels = []
        for i in range(tokens.bit_length() - 1):
            size = 1 << i
            shape = (p, m, tokens // (2 * size), 2, size, width)
            later, earlier = from_start.view(shape)[:, :, :, 1], to_end.view(shape)[:, :, :, 0]
            pair = (later.exp(), earlier.exp())
            levels.append(pair[::-1] if reverse else pair)
            halves = total.view(p, m, tokens // (2 * size), 2, width)
            later += halves[:, :, :, 0, None]
            earlier += halves[:, :, :, 1, None]
            total = halves.sum(3)
        read, write = (to_end, from_start) if reverse else (from_start, to_end)
        return Weights(reverse, None, read.exp_(), write.exp_(), total[:, :, 0].exp(), tuple(levels))
