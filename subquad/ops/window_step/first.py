"""The first call of softmax over a window and linear attention to all before it, without gradients: its kernels, one after another.

`sparse_attention`, the features, `linear_sums` and `merge_sums` launch the same; between them they check, choose and prepare for a
backward what is settled here once, which takes the host as long as the launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import features
from subquad.ops.launcher import prepared
from subquad.ops.linear import fused as linear
from subquad.ops.merge import fused as merge
from subquad.ops.sparse import Layout
from subquad.ops.sparse import fused as sparse


def first_call(
    q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor], layout: Layout, maps: tuple[Tensor, Tensor], factor: Tensor,
    sinks: int, affine: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o ``[B, N, H, V]``, and where it is to `keep` the sums ``[B, H, 2F, V + 1]``.

    Args:
        q, k, v: what softmax sees, through the layout, ``[B, N, ·, ·]``.
        far: queries and keys of the past, of which a query at i sees those up to i − N + M, of M keys: ``[B, M, ·, D]``, and their
            number of the last queries.
        maps, factor, affine: as `window_step` has them.
    """
    late, factor = far[1].shape[1], factor.contiguous()

    def run() -> tuple[Tensor, Tensor]:
        o, lse, top = sparse.forward_by_rule(q, k, v, layout)
        fq, fk = (features.forward(x, w, q.dtype)[0] for x, w in zip(far, maps))
        past = v[:, sinks : sinks + late]
        by_maps, of_values, _ = linear.forward(fq, fk, past, None, None, None, 1.0, keep, q.dtype)
        ones = past.new_ones(past.shape[0], late, 1, 1).expand(-1, -1, fk.shape[2], -1)
        mass, of_ones, _ = linear.forward(fq, fk, ones, None, None, None, 1.0, keep, torch.float32)
        o = merge.forward(o, lse, top, by_maps, mass[..., 0], factor, affine, q.dtype)[0]
        return o, torch.cat([of_values, of_ones], -1) if keep else of_values

    return prepared(run, run)
