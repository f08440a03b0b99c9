"""The definition of causal linear attention, token by token. The oracle of the tests: slow, and short enough to read aloud."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.common import expand_heads


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: Any = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """S_t = diag(a_t) S_{t−1} + k_t v_tᵀ,  o_t = S_tᵀ q_t; with `normalize` z_t = a_t z_{t−1} + k_t, o_t / (q_t·z_t + eps)."""
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            part = slice(start, stop)
            g = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, part]
            before = None if initial_state is None else row(initial_state, i)
            o, state = linear_attention(
                q[:, part], k[:, part], v[:, part], log_decay=g, scale=scale, normalize=normalize, eps=eps,
                initial_state=before, return_state=True,
            )  # fmt: skip
            outs.append(o)
            states.append(state)
        final = tuple(torch.cat(x) for x in zip(*states)) if normalize else torch.cat(states)
        o = torch.cat(outs, 1)
        return (o, final) if return_state else o

    dtype, out_dtype = compute_dtype(q), q.dtype
    state_heads = max(k.shape[2], v.shape[2])
    heads = max(q.shape[2], state_heads)
    q = expand_heads(q, heads).to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, v = expand_heads(k, state_heads).to(dtype), expand_heads(v, state_heads).to(dtype)
    S, z = initial_state if normalize and initial_state is not None else (initial_state, None)
    S = k.new_zeros(k.shape[0], state_heads, k.shape[3], v.shape[3]) if S is None else S
    z = k.new_zeros(k.shape[0], state_heads, k.shape[3]) if z is None else z
    outs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            a = (log_decay if log_decay.dim() == 1 else log_decay[:, t]).to(dtype).exp()
            a = a if log_decay.dim() == 4 else a[..., None]
            S, z = a[..., None] * S, a * z
        S, z = S + k[:, t, :, :, None] * v[:, t, :, None, :], z + k[:, t]
        query = q[:, t].unflatten(1, (state_heads, -1))
        o = torch.einsum("bhrd,bhdv->bhrv", query, S)
        if normalize:
            o = o / (torch.einsum("bhrd,bhd->bhr", query, z) + eps)[..., None]
        outs.append(o.flatten(1, 2))
    o = torch.stack(outs, 1) if outs else v.new_zeros(q.shape[0], 0, heads, v.shape[3])
    o = o.to(out_dtype)
    return (o, (S, z) if normalize else S) if return_state else o


def row(state: Any, i: int) -> Any:
    """Sequence i of a state or a pair of states."""
    return tuple(x[i : i + 1] for x in state) if isinstance(state, tuple) else state[i : i + 1]
