"""The primitives: what nearly every mechanism is composed of."""

from subquad.ops.delta import delta_rule
from subquad.ops.linear import linear_attention
from subquad.ops.merge import merge
from subquad.ops.moments import Moments, apply_moments, gather_moments, mean_features, moment_attention
from subquad.ops.sparse import Layout, RelativeBias, sparse_attention

__all__ = [
    "Layout", "Moments", "RelativeBias", "apply_moments", "delta_rule", "gather_moments", "linear_attention", "mean_features", "merge",
    "moment_attention", "sparse_attention",
]  # fmt: skip
