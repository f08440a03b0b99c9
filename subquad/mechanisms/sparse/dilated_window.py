"""Dilated sliding window: softmax over keys some steps apart, which reaches further at the cost of a plain window.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  j = i − d·t ,  t = 0 … window − 1 ,  j ≥ 0

d is the dilation, of all heads or of each share of them. Nothing is shifted at the start: first tokens see fewer keys. Tokens of
one residue mod d see only each other, so each residue is a sequence of its own under a plain window. Rotary turns q and k. What
is kept is a ring of the last window · d keys and values, as in `ops/sparse/ring.py`.
Beltagy, Peters, Cohan: Longformer (arXiv 2004.05150), section 3.1, in its causal form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.ring import holds, store
from subquad.rotary import Rotary, rotate


def _shares(dilation: int | Sequence[int]) -> tuple[int, ...]:
    return (dilation,) if isinstance(dilation, int) else tuple(dilation)


def _flops(s: Shape, window: int = 256, dilation: int | Sequence[int] = (2,), **_: object) -> float:
    shares, pairs = _shares(dilation), 0.0
    for d in shares:
        rows = s.tokens / d  # tokens of one residue
        near = min(rows, window)
        pairs += d * (near * (near + 1) / 2 + (rows - near) * window) / len(shares)
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.values)


def _state_bytes(s: Shape, window: int = 256, dilation: int | Sequence[int] = (2,), **_: object) -> float:
    shares = _shares(dilation)
    return s.batch * window * sum(shares) * s.kv // len(shares) * (s.head_dim + s.values) * s.itemsize


CARD = Card(
    title="Dilated window",
    paper="arXiv 2004.05150",
    family="sparse",
    summary="Softmax over every d-th of the last tokens, d chosen by head: a longer reach at the cost of a plain window.",
    causal=True,
    recurrent=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=_state_bytes,
    keeps="the last {window} · dilation keys and values (dilation {dilation}) of {kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("dilated-window")
class DilatedWindow(Attention):
    """Attention to every d-th of the last tokens.

    Args:
        window: keys that a token sees, itself included.
        dilation: d, the distance of the keys: one number, or one for each equal share of the heads, in order.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, window: int = 256, dilation: int | Sequence[int] = (2,), **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if type(window) is not int or window < 1:
            raise InputError("window", window, "an integer of at least 1")
        shares = _shares(dilation) if isinstance(dilation, int | tuple | list) else ()
        if not shares or not all(type(d) is int and d >= 1 for d in shares):
            raise InputError("dilation", repr(dilation), "a positive integer, or one for each share of the heads")
        if self.kv_heads % len(shares):
            raise InputError("dilation", f"{len(shares)} of them", f"a number that divides the heads of keys, {self.kv_heads}")
        self.window, self.dilation = window, dilation

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        shares, outputs = _shares(self.dilation), []
        kept: dict[str, Tensor] = {}
        for i, d in enumerate(shares):
            q_i, k_i, v_i = (x.unflatten(2, (len(shares), -1))[:, :, i] for x in (q, k, v))
            old, length = self._old((k_i, v_i), d, i, call)
            if call.state is None:
                outputs.append(self._whole(q_i, k_i, v_i, d, call.cu_seqlens))
            elif call.cu_seqlens is None:
                outputs.append(self._behind(q_i, k_i, v_i, d, old, length))
            else:
                o = [q_i.new_zeros(1, 0, q_i.shape[2], v.shape[3])]
                for row, (a, b) in enumerate(pairwise(call.cu_seqlens.tolist())):
                    own = [x[row : row + 1] for x in old]
                    o.append(self._behind(q_i[:, a:b], k_i[:, a:b], v_i[:, a:b], d, own, length[row : row + 1]))
                outputs.append(torch.cat(o, 1))
            if call.return_state:
                kept |= {f"{name}{i}": store(x, new, length, 0, call.cu_seqlens) for name, x, new in zip("kv", old, (k_i, v_i))}
        return torch.cat(outputs, 2), kept if call.return_state else None

    def _old(self, new: Sequence[Tensor], d: int, share: int, call: Call) -> tuple[list[Tensor], Tensor]:
        """The rings of keys and values ``[R, window · d, …]`` and what each row has seen."""
        if call.state is not None:
            return [call.state[f"{name}{share}"] for name in "kv"], call.state.length
        rows = new[0].shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        zeros = [x.new_zeros(rows, self.window * d if call.return_state else 0, *x.shape[2:]) for x in new]
        return zeros, torch.zeros(rows, dtype=torch.long, device=new[0].device)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, d: int, cu_seqlens: Tensor | None) -> Tensor:
        """Whole sequences."""
        batch, n = q.shape[:2]
        if cu_seqlens is None:
            q, k, v = (by_residue(F.pad(x, (0, 0, 0, 0, 0, -n % d)), d) for x in (q, k, v))
            o = sparse_attention(q, k, v, Layout.window(q.shape[1], self.window))
            return in_order(o, batch, d)[:, :n]
        order, ends = packed_order(cu_seqlens, n, d)
        q, k, v = (x[:, order] for x in (q, k, v))
        o = sparse_attention(q, k, v, Layout.window(n, self.window), cu_seqlens=ends)
        return o[:, order.argsort()]

    def _behind(self, q: Tensor, k: Tensor, v: Tensor, d: int, old: list[Tensor], length: Tensor) -> Tensor:
        """New tokens ``[R, n, …]`` behind rings, which stand by residue as they are: window · d slots, a multiple of d."""
        n, rows = q.shape[1], torch.arange(q.shape[0], device=q.device)[:, None]
        # new tokens are set so that their residues fall into place: the first into slot length mod d
        slots = (length % d)[:, None] + torch.arange(n, device=q.device)
        each = -(-(n + d - 1) // d)  # of one residue

        def place(x: Tensor, fill: float = 0) -> Tensor:
            return by_residue(x.new_full((x.shape[0], each * d, *x.shape[2:]), fill).index_put((rows, slots), x), d)

        held = holds(length, self.window * d, 0)
        new = place((length[:, None] + torch.arange(n, device=q.device)) // d, -1)
        k_pos = torch.cat([by_residue(torch.where(held < length[:, None], held, -d) // d, d), new], 1)
        k, v = (torch.cat([by_residue(x, d), place(y)], 1) for x, y in zip(old, (k, v)))
        o = sparse_attention(place(q), k, v, Layout.window(each, self.window, m=k.shape[1]), q_pos=new, k_pos=k_pos)
        return in_order(o, q.shape[0], d)[rows, slots]


def by_residue(x: Tensor, d: int) -> Tensor:
    """Tokens ``[R, T · d, …]`` as ``[R · d, T, …]``, those of one residue mod d in a row."""
    return x.unflatten(1, (x.shape[1] // d, d)).transpose(1, 2).flatten(0, 1)


def in_order(x: Tensor, rows: int, d: int) -> Tensor:
    """The inverse of `by_residue`."""
    return x.unflatten(0, (rows, d)).transpose(1, 2).flatten(1, 2)


def packed_order(cu_seqlens: Tensor, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Packed tokens sorted by sequence and residue: their indices ``[n]``, and the offsets of the residues' sequences."""
    start, residue = cu_seqlens[:-1].long(), torch.arange(d, device=cu_seqlens.device)
    lengths = ((cu_seqlens.diff().long()[:, None] - residue + d - 1) // d).clamp(min=0).flatten()
    sequence = torch.repeat_interleave(torch.arange(len(start), device=start.device), cu_seqlens.diff().long(), output_size=n)
    offset = torch.arange(n, device=start.device) - start[sequence]
    return (sequence * d + offset % d).argsort(stable=True), F.pad(lengths.cumsum(0), (1, 0))


def reference(module: DilatedWindow, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    shares = _shares(module.dilation)
    d = torch.tensor(shares, device=q.device).repeat_interleave(module.heads // len(shares))[:, None, None]
    away = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
    seen = (away >= 0) & (away % d == 0) & (away // d < module.window)
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
