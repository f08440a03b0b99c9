"""Based: linear attention with the second-order Taylor expansion of exp, on narrow learned projections of q and k.

    s_ij = (W_q q_i)·(W_k k_j) / √f                         f = feature_dim = 16
    o_i  = Σ_j (1 + s_ij + s_ij²/2) v_j / (Σ_j (1 + s_ij + s_ij²/2) + 1e-12),  over j ≤ i if causal

The weights are φ(W_q q_i)·φ(W_k k_j) with 1 + f + f(f+1)/2 = 153 features, the compact form of the authors' 1 + f + f²
= 273 (it names each product x_i x_j once). Features are made for one group of tokens at a time and made again in the
backward pass, never for all tokens at once. W is per head, without bias. The published layer has no rotary.
Arora et al.: Simple linear attention language models balance the recall-throughput tradeoff (arXiv 2402.18668).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.feature_maps import project_heads, taylor2
from subquad.ops.linear import linear_attention
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-12
CPU_FEATURES, GPU_FEATURES = 1 << 20, 1 << 26  # numbers in one group's features


def _features(feature_dim: int) -> int:
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def _flops(s: Shape, feature_dim: int = 16, **_: object) -> float:
    projections = 2 * (s.heads + s.kv) * s.head_dim * feature_dim
    return s.batch * s.tokens * (projections + 4 * s.heads * _features(feature_dim) * (s.values + 1))


def _state_bytes(s: Shape, feature_dim: int = 16, **_: object) -> float:
    return max(4, s.itemsize) * s.batch * s.kv * _features(feature_dim) * (s.values + 1)


@register("based")
class Based(Attention):
    """Linear attention with the weights 1 + s + s²/2.

    Args:
        feature_dim: f, the width to which W projects q and k.
        rotate: turn q and k by rotary before W; the published layer has none.
        causal: whether a token sees only itself and what came before.
    """

    card = Card(
        title="Based",
        paper="arXiv 2402.18668",
        family="linear",
        summary="Linear attention with the second-order Taylor expansion of exp on narrow learned queries and keys.",
        causal=True,
        bidirectional=True,
        recurrent=True,
        flops=_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=_state_bytes,
        keeps="for each of {kv_heads} key heads a sum over tokens of 1 + f + f(f+1)/2 features (f = {feature_dim}) "
        "× ({value_dim} + 1) numbers in float32",
    )

    def __init__(
        self, heads: int, head_dim: int, *, feature_dim: int = 16, rotate: bool = False, causal: bool = True, **sizes: object
    ) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if type(feature_dim) is not int or feature_dim < 1:
            raise InputError("feature_dim", feature_dim, "a positive integer")
        self.feature_dim, self.rotate, self.causal = feature_dim, rotate, causal
        # a random subspace, the same for q and k, scaled so that s has the size of q·k / √D
        weight = torch.stack([nn.init.orthogonal_(torch.empty(head_dim, feature_dim)) for _ in range(self.kv_heads)])
        weight = weight * max(head_dim / feature_dim, feature_dim / head_dim) ** 0.25
        self.W_q = nn.Parameter(weight.repeat_interleave(heads // self.kv_heads, 0))  # [H, D, f]
        self.W_k = nn.Parameter(weight.clone())  # [Hs, D, f]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        dtype = q.dtype
        q, k = rotate(call.rotary if self.rotate else None, q, k)
        q, k = project_heads(q, self.W_q), project_heads(k, self.W_k)
        v = v.to(q.dtype)
        if not self.causal:
            return moment_attention(q, k, v, feature_map=taylor2, reduce="sum", eps=EPS, cu_seqlens=call.cu_seqlens).to(dtype), None
        start = None if call.state is None else (call.state["S"], call.state["z"])
        o, S, z = taylor_attention(q, k, v, start, call.cu_seqlens, keep=call.return_state)
        return o.to(dtype), {"S": S, "z": z} if call.return_state else None


class Group(NamedTuple):
    """Tokens start … stop-1: they belong to rows first … last-1 of the state, by offsets `cu_seqlens` counted from start."""

    start: int
    stop: int
    first: int
    last: int
    cu_seqlens: Tensor | None


def groups(tokens: int, size: int, cu_seqlens: Tensor | None) -> list[Group]:
    """Groups of `size` tokens; a batch counts as one row."""
    cuts = [(a, min(a + size, tokens)) for a in range(0, tokens, size)]
    if cu_seqlens is None:
        return [Group(a, b, 0, 1, None) for a, b in cuts]
    ends, found = cu_seqlens.tolist(), []
    for a, b in cuts:
        first, last = bisect_right(ends, a) - 1, bisect_left(ends, b)
        found.append(Group(a, b, first, last, cu_seqlens[first : last + 1].clamp(a, b) - a))
    return found


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, start: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention with weights 1 + s + s²/2, group by group; autograd makes a group's features again.

    Args:
        q, k: projected, ``[B, N, ·, f]``; v: ``[B, N, Hs, V]``.
        start: S ``[B, Hs, F, V]`` and z ``[B, Hs, F]`` before the first token.
        keep: whether the states after the last tokens are wanted.

    Returns:
        o ``[B, N, H, V]``, S and z.
    """
    (batch, tokens, heads, width), kv_heads = q.shape, v.shape[2]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if start is None:
        start = q.new_zeros(1, kv_heads, _features(width), v.shape[3]), q.new_zeros(1, kv_heads, _features(width))
        start = start[0].expand(rows, -1, -1, -1), start[1].expand(rows, -1, -1)
    numbers = CPU_FEATURES if q.device.type == "cpu" else GPU_FEATURES
    size = max(256, numbers // max(1, batch * heads * _features(width)) // 64 * 64)
    if tokens <= size:
        return attend_group(q, k, v, *start, cu_seqlens)
    states = [start] if cu_seqlens is None else list(zip(start[0].split(1), start[1].split(1)))
    outputs, lengths = [], [min(size, tokens - a) for a in range(0, tokens, size)]
    for g, *qkv in zip(groups(tokens, size, cu_seqlens), q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1)):
        S, z = (torch.cat(parts) for parts in zip(*states[g.first : g.last]))
        o, S, z = remade(attend_group, *qkv, S, z, g.cu_seqlens)
        states[g.first : g.last] = [(S, z)] if g.cu_seqlens is None else list(zip(S.split(1), z.split(1)))
        if not keep:  # only the last row goes on
            states[g.first : g.last - 1] = [(S[:0], z[:0])] * (g.last - g.first - 1)
        outputs.append(o)
    S, z = (torch.cat(parts) for parts in zip(*states))
    return torch.cat(outputs, 1), S, z


def remade(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of the arguments; what is in it is not stored for the backward pass but made again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def attend_group(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    o, (S, z) = linear_attention(
        taylor2(q), taylor2(k), v, scale=1.0, normalize=True, eps=EPS, initial_state=(S, z), return_state=True, cu_seqlens=cu_seqlens
    )  # fmt: skip
    return o, S, z


def reference(module: Based, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary if module.rotate else None, q, k)
    q, k = torch.einsum("bnhd,hdf->bnhf", q, module.W_q), torch.einsum("bnhd,hdf->bnhf", k, module.W_k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    s = torch.einsum("bnhf,bmhf->bhnm", q, k) / module.feature_dim**0.5
    weight = 1 + s + s**2 / 2
    weight = weight.tril() if module.causal else weight
    return torch.einsum("bhnm,bmhv->bnhv", weight / (weight.sum(-1, keepdim=True) + EPS), v)
