"""Sliding-window attention with attention sinks: softmax over the last keys, and over the first few for good.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  i − window < j ≤ i  and  j < sinks, j ≤ i

Rotary turns q and k at their own positions. What is kept is the first `sinks` keys and values and, behind them, a ring
of the last `window`, slot by slot as in `ops/sparse/ring.py`.
Xiao et al.: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), which counts positions inside
the cache; the window is Beltagy et al.: Longformer (arXiv 2004.05150).
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.ring import holds, store
from subquad.ops.sparse.stream import Stream
from subquad.rotary import Rotary, rotate
from subquad.state import State


def _flops(s: Shape, window: int = 512, sinks: int = 4, **_: object) -> float:
    seen = min(s.tokens, window)
    pairs = seen * (seen + 1) / 2 + (s.tokens - seen) * window + max(0, s.tokens - window) * sinks
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.values)


def _state_bytes(s: Shape, window: int = 512, sinks: int = 4, **_: object) -> float:
    return s.batch * (window + sinks) * s.kv * (s.head_dim + s.values) * s.itemsize


CARD = Card(
    title="Sliding window with sinks",
    paper="arXiv 2309.17453",
    family="sparse",
    summary="Exact softmax over the last tokens and the first few; everything between is forgotten.",
    causal=True,
    recurrent=True,
    training_free=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=_state_bytes,
    keeps="the last {window} and the first {sinks} keys and values of {kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("sliding-window")
class SlidingWindow(Attention):
    """Attention to the last `window` tokens and the first `sinks`.

    Args:
        window: keys that a token sees, itself included.
        sinks: first tokens that every later token sees.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, window: int = 512, sinks: int = 4, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(name, value, f"an integer of at least {least}")
        self.window, self.sinks = window, sinks

    def layout(self, n: int, m: int | None = None) -> Layout:
        """The keys that n queries see of m."""
        return Layout.window(n, self.window, self.sinks, m=m)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        if call.state is not None and call.cu_seqlens is None and q.shape[1] == 1:
            return self._step(q, k, v, call.state)
        if call.state is None:
            o = sparse_attention(q, k, v, self.layout(q.shape[1]), cu_seqlens=call.cu_seqlens)
            if not call.return_state:
                return o, None
            rows = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
            old = [x.new_zeros(rows, self.window + self.sinks, *x.shape[2:]) for x in (k, v)]
            length = torch.zeros(rows, dtype=torch.long, device=q.device)
        else:
            old, length = [call.state["k"], call.state["v"]], call.state.length
            o = self._go_on(q, k, v, old, length, call.cu_seqlens)
        kept = [store(x, new, length, self.sinks, call.cu_seqlens) for x, new in zip(old, (k, v))]
        return o, {"k": kept[0], "v": kept[1]}

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """One token: it takes its slot, and every slot filled so far is seen."""
        at = state.length[:, None]
        slot = torch.arange(self.window + self.sinks, device=q.device)
        here = slot == at.where(at < self.sinks, self.sinks + (at - self.sinks) % self.window)
        k, v = (torch.where(here[..., None, None], new, state[name]) for name, new in (("k", k), ("v", v)))
        unfilled = torch.where(slot <= at, slot, -1)
        return sparse_attention(q, k, v, Layout.dense(1, k.shape[1]), k_pos=unfilled), {"k": k, "v": v}

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, old: list[Tensor], length: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """New tokens behind what was kept, by position."""
        stream = Stream(self.window + self.sinks, length.shape[0], q.shape[1], cu_seqlens, q.device)
        new = stream.positions(length)
        held = holds(length, self.window, self.sinks)
        k, v, k_pos = (stream.join(x, y) for x, y in zip((*old, held.where(held < length[:, None], -1)), (k, v, new)))
        q, q_pos = stream.pad(q), stream.pad(new, -1)
        layout = self.layout(q.shape[1], k.shape[1])
        return stream.unpad(sparse_attention(q, k, v, layout, q_pos=q_pos, k_pos=k_pos, cu_seqlens=stream.cu_seqlens))


def reference(module: SlidingWindow, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    seen = (j <= i) & ((j > i - module.window) | (j < module.sinks))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
