"""Feature maps φ of linear attention: each takes ``[…, D]`` to ``[…, F]``, by name.

The features of some maps are r·D wide, r copies of D channels side by side ("halves").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.checks import InputError, compute_dtype, nearest
from subquad.ops.common import full_precision, kernels_serve

FeatureMap = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0 (Katharopoulos et al., arXiv 2006.16236), without the rounding of expm1(x) + 1 at very negative x."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def softmax(x: Tensor) -> Tensor:
    """Softmax over the channels."""
    return x.softmax(-1)


def exp_halves(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[exp(y), exp(−y)], 2D wide (Hedgehog, arXiv 2402.04347); |y| is cut where sums of products would overflow.

    The cut, 31 in float32 and 248 in float64, leaves room for e^{2·31} times 10¹¹ keys: below it the map is exact.
    """
    limit = 0.35 * torch.tensor(torch.finfo(y.dtype).max, dtype=torch.float64).log().item()
    y = y.clamp(-limit, limit)
    return torch.cat([y, -y], -1).exp().to(dtype or y.dtype)


class SoftmaxHalves(torch.autograd.Function):
    """Both halves as one node: what it keeps is the features, and the backward is one softmax's over rows of either half.

    Features at the floor are taken for softmax's own, so that up to 1e-12 of their gradient passes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return torch.stack([y, -y], -2).softmax(-1).clamp(min=1e-12).flatten(-2).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.wide = inputs[0].dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (f,) = ctx.saved_tensors
        f, grad = (x.unflatten(-1, (2, x.shape[-1] // 2)) for x in (f, grad.to(f.dtype)))
        each = torch._softmax_backward_data(grad.contiguous(), f, -1, f.dtype)
        return (each[..., 0, :] - each[..., 1, :]).to(ctx.wide), None


def softmax_halves(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[softmax(y), softmax(−y)], 2D wide, each half on its own and at least 1e-12 (Hedgehog as in LoLCATs' code).

    Computed in the dtype of y, and rounded to `dtype` where one is given.
    """
    return SoftmaxHalves.apply(y, dtype or y.dtype)


def feature_dtype(x: Tensor) -> torch.dtype:
    """What features made of x are kept in for the kernels: its own dtype, but float16 has no room for small ones."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def softmax2(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """softmax([2y, −2y]), 2D wide, one softmax over both halves (Hedgehog as in flash-linear-attention)."""
    return torch.cat([2 * y, -2 * y], -1).softmax(-1).to(dtype or y.dtype)


def sign_cube(x: Tensor) -> Tensor:
    """[relu(x)³, relu(−x)³], 2D wide: NaLaFormer's map of keys (arXiv 2506.21137)."""
    return torch.cat([x.relu() ** 3, (-x).relu() ** 3], -1)


def norm_power(x: Tensor) -> Tensor:
    """[relu(d)^p, relu(−d)^p] with d = x/‖x‖ and p = 3 (½ + tanh‖x‖), 2D wide: NaLaFormer's map of queries.

    Zero vectors, and zero channels, have zero features and finite gradients.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.where(norm > 0, 1)
    size = x.abs().where(x != 0, 1)
    power = (3 * (0.5 + norm.tanh()) * (size.log() - norm.log())).exp()
    return torch.cat([power.where(x > 0, 0), power.where(x < 0, 0)], -1)


def taylor2(x: Tensor) -> Tensor:
    """Second-order Taylor map of exp(q·k/√D): φ(q)·φ(k) = 1 + s + s²/2, s = q·k/√D (Based, arXiv 2402.18668).

    [1, x_i / D^¼, x_i² / √(2D), x_i x_j / √D for i < j]: 1 + D + D(D+1)/2 features, the compact form of all D² products.
    """
    width = x.shape[-1]
    y = x * width**-0.25
    pairs = [y[..., i : i + 1] * y[..., i + 1 :] for i in range(width - 1)]  # slices: indexing pairs is 5 times slower
    return torch.cat([torch.ones_like(x[..., :1]), y, y.square() * 0.5**0.5, *pairs], -1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity,
    "elu1": elu1,
    "relu": torch.relu,
    "exp": torch.exp,
    "silu": F.silu,
    "softmax": softmax,
    "exp_halves": exp_halves,
    "softmax_halves": softmax_halves,
    "softmax2": softmax2,
    "sign_cube": sign_cube,
    "norm_power": norm_power,
    "taylor2": taylor2,
}


@full_precision
def project_heads(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map per head in float32 or float64, as one product per head of x for all rows.

    Args:
        x: ``[B, N, Hx, D]``.
        weight: ``[H, D, F]``; Hx divides H, and heads of x are shared by maps that follow each other.
        bias: ``[H, F]``.

    Returns:
        ``[B, N, H, F]``.
    """
    y = _project(x, weight).flatten(2, 3)
    return y if bias is None else y + bias


PIECE = 512  # rows of a gradient that are added up by one product


class RowsProduct(torch.autograd.Function):
    """``[H, T, D] @ [H, D, F]``, whose gradient of the second is summed over T in pieces, side by side, for a GPU.

    As one product a head, few programs would add up all of T one after another.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return rows @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight = inputs
        needs = ctx.needs_input_grad  # rows are a float32 copy, which frozen maps need not keep
        ctx.save_for_backward(rows if needs[1] else None, weight if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        of_rows = grad @ weight.transpose(1, 2) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None
        whole = rows.shape[1] // PIECE * PIECE
        pieces, pieces_grad = (x[:, :whole].unflatten(1, (-1, PIECE)) for x in (rows, grad))
        return of_rows, (pieces.transpose(2, 3) @ pieces_grad).sum(1) + rows[:, whole:].transpose(1, 2) @ grad[:, whole:]


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """``[B, N, Hx, H / Hx, F]``."""
    dtype, heads = compute_dtype(x), x.shape[2]
    each = weight.to(dtype).unflatten(0, (heads, -1))  # [Hx, H / Hx, D, F]
    rows = x.to(dtype).flatten(0, 1).transpose(0, 1)  # [Hx, B · N, D]
    each = each.transpose(1, 2).flatten(2)
    y = RowsProduct.apply(rows, each) if x.is_cuda else rows @ each
    return y.transpose(0, 1).unflatten(0, x.shape[:2]).unflatten(-1, (-1, weight.shape[-1]))


@full_precision
def project_softmax_halves(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`softmax_halves` of `project_heads`, rounded to `dtype`, by default `feature_dtype`: ``[B, N, H, 2F]``; on a GPU in one pass."""
    dtype = dtype or feature_dtype(x)
    if kernels_serve(x, *weight.shape[1:]):
        from subquad.ops import features  # Triton is imported when it is first needed

        if features.serve(x, weight):
            return features.softmax_features(x, weight, dtype)
    return softmax_halves(_project(x, weight), dtype).flatten(2, 3)


def feature_map(name: str | FeatureMap | None) -> FeatureMap:
    """The map of that name; a function stands for itself, None for the identity.

    >>> feature_map("elu1")(torch.zeros(2))
    tensor([1., 1.])
    """
    if name is None:
        return identity
    if callable(name):
        return name
    if not isinstance(name, str):
        raise InputError("feature_map", type(name).__name__, "a name, a function or None")
    if name not in FEATURE_MAPS:
        raise nearest("feature_map", name, FEATURE_MAPS, "feature map")
    return FEATURE_MAPS[name]
