"""Linear attention with decays per value channel, against its recurrence, and against the operator it mirrors."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from subquad.ops.linear import linear_attention
from subquad.ops.linear.by_value import linear_attention_by_value

SHAPES = {  # B, N, H, Hs, D, V, cu_seqlens
    "plain": (2, 150, 2, 2, 8, 8, None),
    "grouped, values wider, tail of one": (2, 65, 6, 2, 4, 7, None),
    "one token": (3, 1, 4, 2, 8, 6, None),
    "no tokens": (2, 0, 2, 2, 4, 4, None),
    "no rows": (0, 20, 2, 2, 4, 4, None),
    "packed": (1, 215, 4, 2, 6, 5, [0, 0, 1, 65, 150, 150, 215]),
}
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def defined(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, cu: list[int] | None) -> tuple[Tensor, Tensor]:
    """S_t = S_{t−1} diag(a_t) + k_t v_tᵀ, token by token."""
    if cu is not None:
        parts = [defined(*(x[:, a:b] for x in (q, k, v, g)), state[i : i + 1], scale, None) for i, (a, b) in enumerate(pairwise(cu))]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])
    group, out = q.shape[2] // v.shape[2], []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, :].exp() + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(scale * torch.einsum("bhd,bhdv->bhv", q[:, t], state.repeat_interleave(group, 1)))
    return (torch.stack(out, 1) if out else q.new_zeros(*q.shape[:3], v.shape[3])), state


def tensors(shape, strength=1.0):
    batch, n, heads, state_heads, dim, width, cu = shape
    rows = batch if cu is None else len(cu) - 1
    sizes = [(batch, n, heads, dim), (batch, n, state_heads, dim), (batch, n, state_heads, width)]
    q, k, v = (torch.randn(size, dtype=torch.float64) for size in sizes)
    g = -strength * torch.rand(batch, n, state_heads, width, dtype=torch.float64)
    return q, k, v, g, torch.randn(rows, state_heads, dim, width, dtype=torch.float64)


def run(q, k, v, g, state, scale, cu):
    cu = None if cu is None else torch.tensor(cu)
    return linear_attention_by_value(q, k, v, g, scale=scale, initial_state=state, cu_seqlens=cu)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    if got.numel():
        assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("strength", [1.0, 40.0, 1000.0])
@BY_SHAPE
def test_output_state_and_gradients(shape, strength):
    leaves = [x.requires_grad_() for x in tensors(shape, strength)]
    found, expected = run(*leaves, 0.3, shape[-1]), defined(*leaves, 0.3, shape[-1])
    for got, want in zip(found, expected):
        close(got, want)
    if not shape[1]:
        return
    weight = [torch.randn_like(x) for x in found]
    grads = [torch.autograd.grad(x, leaves, weight) for x in (found, expected)]
    for got, want in zip(*grads):
        close(got, want, 1e-9)


def test_one_decay_for_all_channels_is_a_decay_per_token():
    q, k, v, g, state = tensors(SHAPES["grouped, values wider, tail of one"])
    g = g[..., :1].expand_as(g)
    expected = linear_attention(q, k, v, log_decay=g[..., 0], initial_state=state, return_state=True)
    for got, want in zip(linear_attention_by_value(q, k, v, g, initial_state=state), expected):
        close(got, want)


def test_it_is_the_transpose_of_decays_per_key_channel():
    """Its state is that of linear attention with keys and values exchanged, turned."""
    _, k, v, g, _ = tensors(SHAPES["plain"])
    _, state = linear_attention_by_value(k, k, v, g)
    _, turned = linear_attention(v, v, k, log_decay=g, return_state=True)
    close(state, turned.mT)


def test_a_split_is_one_pass():
    q, k, v, g, state = tensors(SHAPES["plain"])
    whole, last = linear_attention_by_value(q, k, v, g, initial_state=state)
    outputs = []
    for a, b in ((0, 64), (64, 65), (65, 66), (66, 150)):
        o, state = linear_attention_by_value(*(x[:, a:b] for x in (q, k, v, g)), initial_state=state)
        outputs.append(o)
    close(torch.cat(outputs, 1), whole)
    close(state, last)
