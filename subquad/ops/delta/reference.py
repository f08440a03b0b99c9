"""The definition of the delta rule, token by token. The oracle of the tests: slow, and short enough to read aloud."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.common import expand_heads


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """S ← a_t S_{t−1},  S_t = S + β_t k_t (v_t − Sᵀ k_t)ᵀ,  o_t = S_tᵀ q_t."""
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            part = slice(start, stop)
            g = None if log_decay is None else log_decay[:, part]
            before = None if initial_state is None else initial_state[i : i + 1]
            o, state = delta_rule(
                q[:, part], k[:, part], v[:, part], beta[:, part], log_decay=g, scale=scale, initial_state=before, return_state=True
            )
            outs.append(o)
            states.append(state)
        return (torch.cat(outs, 1), torch.cat(states)) if return_state else torch.cat(outs, 1)

    dtype = compute_dtype(q)
    state_heads = max(k.shape[2], v.shape[2])
    heads = max(q.shape[2], state_heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query = expand_heads(q, heads).to(dtype).unflatten(2, (state_heads, -1)) * scale
    k, v, beta = expand_heads(k, state_heads).to(dtype), expand_heads(v, state_heads).to(dtype), beta.to(dtype)
    S = k.new_zeros(k.shape[0], state_heads, k.shape[3], v.shape[3]) if initial_state is None else initial_state.to(dtype)
    outs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            a = log_decay[:, t].to(dtype).exp()
            S = (a[..., None] if log_decay.dim() == 4 else a[..., None, None]) * S
        recalled = torch.einsum("bhdv,bhd->bhv", S, k[:, t])
        S = S + torch.einsum("bhd,bhv->bhdv", k[:, t], beta[:, t, :, None] * (v[:, t] - recalled))
        outs.append(torch.einsum("bhrd,bhdv->bhrv", query[:, t], S).flatten(1, 2))
    o = torch.stack(outs, 1) if outs else v.new_zeros(q.shape[0], 0, heads, v.shape[3])
    return (o.to(q.dtype), S) if return_state else o.to(q.dtype)
