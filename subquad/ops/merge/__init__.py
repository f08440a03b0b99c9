"""`merge`: joins softmax attention over disjoint sets of keys into attention over their union, exactly.

m_i = w_i exp(lse_i) ,   o = Σ_i m_i o_i / Σ_i m_i ,   lse = log Σ_i m_i

`merge_sums` joins softmax attention over some keys and sums over others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.checks import InputError, compute_dtype, shape_of
from subquad.ops.common import kernels_serve
from subquad.ops.merge.reference import merge_reference

__all__ = ["merge", "merge_reference", "merge_sums"]

WIDEST = 60.0  # exponents are held below this; only a part of weight 0 could pass it


def merge(parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor | float] | None = None) -> tuple[Tensor, Tensor]:
    """Join partial softmax results ``(o, lse)`` over disjoint keys.

    >>> near = sparse_attention(q, k, v, Layout.window(n, 64), return_lse=True)
    >>> far = sparse_attention(q, k, v, others, return_lse=True)
    >>> o, lse = merge([near, far])                   # o [B, N, H, V], lse [B, N, H]

    Args:
        parts: pairs of o ``[B, N, H, V]`` and its natural log-sum-exp ``[B, N, H]``, −inf where it saw no key.
        weights: for each part a factor ≥ 0 of its mass, a number or a tensor that broadcasts to lse.

    Returns:
        o in the dtype of the first part, and lse in float32 (float64 for float64). Rows empty in all parts give 0 and
        −inf. Gradients are finite everywhere.
    """
    _check(parts, weights)
    dtype = compute_dtype(parts[0][0])
    logs = torch.stack([lse.to(dtype) for _, lse in parts])
    masses = torch.ones_like(logs) if weights is None else torch.stack([_weight(w, logs[0]) for w in weights])
    # the largest part that counts is the unit; a constant, as it cancels
    unit = logs.detach().where(masses > 0, -torch.inf).amax(0)
    unit = unit.where(unit > -torch.inf, 0.0)
    masses = masses * (logs - unit).clamp(max=WIDEST).exp()
    total = masses.sum(0)
    seen = total > 0
    share = masses / total.where(seen, 1.0)
    o = (share[..., None] * torch.stack([o.to(dtype) for o, _ in parts])).sum(0)
    lse = (unit + total.where(seen, 1.0).log()).where(seen, -torch.inf)
    return o.to(parts[0][0].dtype), lse


def merge_sums(
    near: tuple[Tensor, Tensor, Tensor], far: Tensor, mass: Tensor, factor: Tensor, *, affine: bool, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """One normaliser over softmax attention, relative to its greatest score, and over sums of other keys.

        m = g exp(lse − max)      o = (m o_near + w far) / (m + w mass)      g = sigmoid(factor),  w = 1 − g if affine, else 1

    Args:
        near: o ``[B, N, H, V]``, and lse and max of its scores ``[B, N, H]``.
        far: sums of values ``[B, M, H, V]`` of the last M ≤ N tokens, the others having none.
        mass: sums of the weights of far ``[B, M, H, 1]``.
        factor: ``[H]``.

    Returns:
        o ``[B, N, H, V]`` in `dtype`, computed in float32 (float64 for float64).

    Raises:
        InputError: far has more tokens than o.
    """
    if far.shape[1] > near[0].shape[1]:
        raise InputError("far", shape_of(far), f"at most the {near[0].shape[1]} tokens of o")
    if kernels_serve(far, far.shape[3]) and near[1].dtype != torch.float64:
        from subquad.ops.merge import fused  # Triton is imported when it is first needed

        return fused.merge_sums(*near, far, mass[..., 0], factor, affine, dtype)
    o, lse, top = near
    missing = o.shape[1] - far.shape[1]
    if missing:
        far, mass = pad(far, (0, 0, 0, 0, missing, 0)), pad(mass, (0, 0, 0, 0, missing, 0))
    g = factor.to(lse.dtype).sigmoid()
    near_mass = (g * (lse - top).exp())[..., None]
    weight = (1 - g)[:, None] if affine else 1
    share = (near_mass + weight * mass).reciprocal()  # not a division of the sums, whose gradient takes more passes over them
    return (near_mass * share * o + weight * share * far).to(dtype)


def _weight(weight: Any, lse: Tensor) -> Tensor:
    return torch.as_tensor(weight, dtype=lse.dtype, device=lse.device).expand_as(lse)


def _check(parts: Any, weights: Any) -> None:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise InputError("parts", type(parts).__name__ if not isinstance(parts, (list, tuple)) else "none", "a list of pairs (o, lse)")
    for i, part in enumerate(parts):
        if not isinstance(part, (list, tuple)) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise InputError(f"parts[{i}]", type(part).__name__, "a pair of tensors (o, lse)")
        o, lse = part
        if o.shape != parts[0][0].shape:
            raise InputError(f"parts[{i}]", f"o {shape_of(o)}", f"o of the shape of the first, {list(parts[0][0].shape)}")
        if lse.shape != o.shape[:-1]:
            raise InputError(f"parts[{i}]", f"lse {shape_of(lse)}", f"lse {list(o.shape[:-1])}")
    if weights is None:
        return
    if not isinstance(weights, (list, tuple)) or len(weights) != len(parts):
        raise InputError("weights", f"{type(weights).__name__} for {len(parts)} parts", "a list with one weight for each part")
    for i, weight in enumerate(weights):
        shape, want = tuple(getattr(weight, "shape", ())), tuple(parts[0][1].shape)
        if len(shape) > len(want) or any(a not in (1, b) for a, b in zip(shape[::-1], want[::-1])):
            raise InputError(f"weights[{i}]", list(shape), f"a number, or a tensor that broadcasts to lse {list(want)}")
