"""What `moments.py` checks and times: forms of moment attention, RALA's formulas in plain PyTorch, and the quadratic definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.layers.rotary2d import rala_rotary
from subquad.ops.feature_maps import feature_map
from subquad.ops.moments import moment_attention
from subquad.ops.moments.reference import reference
from subquad.rotary import Rotary

Inputs = dict[str, Tensor]
DIMS = [(64, 64), (16, 16), (32, 48), (48, 48), (80, 80), (96, 96), (128, 128), (128, 64)]


@dataclass(frozen=True)
class Case:
    """Options of `moment_attention`, the optional tensors it takes, and whether it is checked at every head dim."""

    options: dict[str, Any]
    extras: tuple[str, ...] = ()
    rotary: str = ""
    every: bool = False
    learned: tuple[str, ...] = field(default=("q", "k", "v"))


RALA = {"feature_map": "elu1", "global_query": "mean"}
MALA = {"feature_map": "elu1", "normalizer": "magnitude"}
NALA = {"feature_map": ("norm_power", "sign_cube")}
CASES = {
    "rala": Case(RALA, every=True),
    "rala, rotary": Case(RALA, rotary="adjacent", every=True),
    "rala, rotary in halves": Case(RALA, rotary="halves"),
    "mala, rotary": Case(MALA, rotary="adjacent", every=True),
    "nalaformer, rotary": Case(NALA, rotary="adjacent", every=True),
    "inline": Case({"normalizer": "subtract"}, every=True),
    "l2vit": Case({"feature_map": "relu", "reduce": "sum", "floor": 100.0}),
    "silu and exp": Case({"feature_map": ("silu", "exp"), "normalizer": "none"}),
    "weighted": Case(
        {"feature_map": "elu1"}, ("key_logits", "key_weights", "key_mask", "global_query"), "adjacent",
        learned=("q", "k", "v", "key_logits", "key_weights", "global_query"),
    ),
}  # fmt: skip


def rotary_of(grid: tuple[int, int], width: int, device: Any) -> Rotary:
    return rala_rotary(grid, width, device=device)


def tensors(batch: int, tokens: int, heads: int, width: int, values: int, device: Any, dtype: torch.dtype, case: Case) -> Inputs:
    torch.manual_seed(0)
    x = {name: torch.randn(batch, tokens, heads, width, device=device).to(dtype) for name in "qk"}
    x["v"] = torch.randn(batch, tokens, heads, values, device=device).to(dtype)
    if case.extras:
        x["key_logits"] = 2 * torch.randn(batch, tokens, heads, device=device)
        x["key_weights"] = torch.rand(batch, tokens, heads, device=device)
        x["key_mask"] = torch.rand(batch, tokens, device=device) > 0.3
        x["global_query"] = torch.rand(batch, heads, width, device=device)
    if case.rotary:
        rotary = Rotary.of(torch.arange(tokens, device=device), width, theta=100.0, interleaved=case.rotary == "adjacent")
        x |= {"cos": rotary.cos, "sin": rotary.sin}
    return x


def define(case: Case, x: Inputs, *, kernels: bool = False) -> Inputs:
    """o and its gradients: by `moment_attention`, or by the quadratic definition in the dtype of x."""
    grown = {name: t.detach().clone().requires_grad_(name in case.learned) for name, t in x.items()}
    rotary = Rotary(grown["cos"], grown["sin"], case.rotary == "adjacent") if case.rotary else None
    extras: dict[str, Any] = {name: grown[name] for name in case.extras}
    q, k, v = (grown[name] for name in "qkv")
    if kernels:
        o = moment_attention(q, k, v, rotary=rotary, **extras, **case.options)
    else:
        options = dict(case.options)
        maps = options.pop("feature_map", None)
        maps = maps if isinstance(maps, tuple) else (maps, maps)
        if options.get("global_query") == "mean":
            extras["global_query"] = feature_map(maps[0])(q).mean(1)
            del options["global_query"]
        scale = q.shape[-1] ** -0.5
        o = reference(q, k, v, maps=maps, rotary=rotary, q_rotary=rotary, logit_scale=scale, scale=scale, **extras, **options)
    torch.manual_seed(1)
    incoming = torch.randn(o.shape, device=o.device).bfloat16()  # the same numbers in every dtype
    grads = torch.autograd.grad(o, [grown[name] for name in case.learned], incoming.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(case.learned, grads)}}


def _call(options: dict[str, Any]) -> Callable[..., Tensor]:
    def call(x: Inputs, rotary: Rotary | None = None) -> Tensor:
        return moment_attention(x["q"], x["k"], x["v"], rotary=rotary, **options)

    return call


CALLS = {"rala": _call(RALA), "mala": _call(MALA), "nalaformer": _call(NALA)}


def formulas(x: Inputs, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """RALA as its formulas are written, tensor by tensor (arXiv 2411.07635)."""
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    tokens, dim = q.shape[-2:]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    alpha = torch.softmax(dim**-0.5 * q.mean(-2, keepdim=True) @ k.mT, -1).mT
    k = k * alpha * tokens
    total = q @ k.mean(-2, keepdim=True).mT + 1e-6
    if angles is not None:
        q, k = (turn(t, *(a.to(t.dtype) for a in angles)) for t in (q, k))
    moment = (k.mT * tokens**-0.5) @ (v * tokens**-0.5)
    return (q @ moment / total).transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin
