"""LoLCATs: linear attention over the past and softmax over a window, under one normaliser.

    a_ij = g exp(q_i·k_j / √D − c_i)     j in the window of i or a sink,  c_i the greatest q_i·k_j / √D there
    a_ij = f φ_q(q_i)·φ_k(k_j)           all other j older than the window
    o_i  = Σ_j a_ij v_j / Σ_j a_ij       φ(x) = [softmax(W x), softmax(−W x)], each ≥ 1e-12

g = sigmoid(window_factor) per head, f = 1 − g with `affine_factors`, else 1. c_i is part of the definition: the window's
weights are relative to their own maximum, the others absolute, so the window part with its log-sum-exp weighs
g exp(lse_i − c_i). Two windows: "sw", the last w tokens; "tk" (terrace), the own block of w and the one before it.
`sinks`, this library's own option, keeps the first tokens in the softmax part for good, as Xiao et al. do (arXiv 2309.17453).
Without `far_rotary`, also its own, φ is of unturned q and k, as in LAWCAT and Lizard: what is far is found by what it says, not where.
In bfloat16, φ is computed in float32 and rounded, so that each weight of the past is off by up to 2^-8 of itself.
Rotary turns q and k before all else; grouped keys are repeated to the query heads before the map; W is per query head,
apart for q and k. Zhang et al.: LoLCATs (arXiv 2410.10254); windows and factors as in HazyResearch/lolcats.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad.checks import InputError, check_tensor, compute_dtype
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.common import expand_heads
from subquad.ops.feature_maps import project_softmax_halves
from subquad.ops.linear import linear_sums
from subquad.ops.merge import merge_sums
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.recent import Near, attend_behind, kept_positions
from subquad.ops.sparse.ring import store
from subquad.ops.sparse.stream import Stream
from subquad.ops.window_step import first_kept, serves, serves_first, window_step
from subquad.rotary import Rotary, rotate
from subquad.state import State

Past = tuple[Tensor, Tensor, Tensor]  # sums of values [B, N, H, V] and of weights [B, N, H, 1], and both as a state
START = -2.1972245773362196  # of the window factor: its sigmoid is 0.1
SHARPER = 0.09  # the power of s that `stretched` multiplies maps with: 1.2 at eight times the length
HEAVIER = 2 / 3  # that of the window's weight beside the past's: 4 there


def _held(window: int, window_form: str, sinks: int) -> int:
    """P, the tokens kept: the sinks, and all that a window may still see."""
    return sinks + (window if window_form == "sw" else 2 * window)


def _flops(s: Shape, window: int = 64, window_form: str = "sw", sinks: int = 0, feature_dim: int = 64, **_: object) -> float:
    near = min(s.tokens, _held(window, window_form, sinks)) * (s.head_dim + s.values)
    far = 2 * s.head_dim * feature_dim + 4 * feature_dim * (s.values + 1)
    return 2 * s.batch * s.tokens * s.heads * (near + far)


def _state_bytes(
    s: Shape, window: int = 64, window_form: str = "sw", sinks: int = 0, feature_dim: int = 64, far_rotary: bool = True, **_: object
) -> float:  # fmt: skip
    sums = s.heads * 2 * feature_dim * (s.values + 1) * max(4, s.itemsize)
    keys = s.head_dim * (1 if far_rotary else 2)
    return s.batch * (sums + _held(window, window_form, sinks) * s.kv * (keys + s.values) * s.itemsize)


def _bytes_moved(s: Shape, **_: object) -> float:
    return s.tensor_bytes


CARD = Card(
    title="LoLCATs",
    paper="arXiv 2410.10254",
    family="hybrid",
    summary="Softmax over a short window and learned linear attention over all before it, under one normaliser.",
    causal=True,
    recurrent=True,
    flops=_flops,
    bytes_moved=_bytes_moved,  # not a lambda: modules with a card of their own are pickled with it
    state_bytes=_state_bytes,
    bf16_state=2e-3,
    keeps="for each of {heads} heads a sum over tokens of 2·{feature_dim} features × ({value_dim} + 1) numbers in float32, and "
    "the keys and values of the window ({window}, {window_form}) of {kv_heads} heads",
)


@register("lolcats")
class Lolcats(Attention):
    """Linear attention plus a softmax window.

    Args:
        window: w.
        window_form: "sw", the last w tokens, or "tk", the own block of w tokens and the one before it.
        sinks: first tokens that every later one sees by softmax and not by the linear part; 0, the paper's, with "tk".
        feature_dim: F, the width of W x; there are 2F features.
        affine_factors: the linear part is weighed by 1 − g instead of 1.
        far_rotary: whether φ is of rotated queries and keys, as the paper has it; if not, a state keeps keys turned and unturned.
        init: W is the identity (its first F columns), a map that follows q·k from the start, or drawn as the released
            code does ("kaiming").
    """

    card = CARD
    W_q: nn.Parameter
    W_k: nn.Parameter

    def __init__(
        self, heads: int, head_dim: int, *, window: int = 64, window_form: Literal["sw", "tk"] = "sw", sinks: int = 0,
        feature_dim: int = 64, affine_factors: bool = False, far_rotary: bool = True, init: Literal["identity", "kaiming"] = "identity",
        **sizes: object,
    ) -> None:  # fmt: skip
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        for name, value, known in (("window_form", window_form, ("sw", "tk")), ("init", init, ("identity", "kaiming"))):
            if value not in known:
                raise InputError(name, repr(value), " or ".join(known))
        for name, flag in (("affine_factors", affine_factors), ("far_rotary", far_rotary)):
            if not isinstance(flag, bool):
                raise InputError(name, repr(flag), "True or False")
        for name, size in (("window", window), ("feature_dim", feature_dim)):
            if not isinstance(size, int) or size < 1:
                raise InputError(name, size, "a positive integer")
        if not isinstance(sinks, int) or sinks < 0:
            raise InputError("sinks", sinks, "an integer of at least 0")
        if sinks and window_form == "tk":
            raise InputError("sinks", sinks, "0 with window_form 'tk'")
        self.window, self.window_form, self.sinks, self.feature_dim = window, window_form, sinks, feature_dim
        self.affine_factors, self.far_rotary, self.init = affine_factors, far_rotary, init
        self.held = _held(window, window_form, sinks)
        if sinks:
            self.card = replace(self.card, keeps=self.card.keeps + ", and those of the first {sinks} tokens")
        if not far_rotary:
            self.card = replace(self.card, keeps=self.card.keeps + "; keys turned and unturned")
        for name in ("W_q", "W_k"):
            weight = torch.eye(head_dim, feature_dim).repeat(heads, 1, 1)
            if init == "kaiming":
                weight = torch.empty_like(weight).uniform_(-(head_dim**-0.5), head_dim**-0.5)
            self.register_parameter(name, nn.Parameter(weight))
        self.window_factor = nn.Parameter(torch.full((heads,), START))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        near_q, near_k = rotate(call.rotary, q, k)
        near, far = (near_q, near_k), (near_q, near_k) if self.far_rotary else (q, k)
        if call.cu_seqlens is None and self.window_form == "sw":
            if call.state is None:
                return from_start(self, near, far, v, call.return_state)
            if kernel_serves(self, *near, v, call.state):
                return kernel_step(self, near, far, v, call.state)
        q, k = near if self.far_rotary else (torch.cat(pair, -1) for pair in zip(near, far))  # both kinds, side by side
        if call.state is not None and call.cu_seqlens is None and q.shape[1] == 1:
            return step(self, q, k, v, call.state)
        return forward(self, q, k, v, call)

    def features(self, name: Literal["W_q", "W_k"], x: Tensor) -> Tensor:
        """φ of queries or keys as `mix` has them: ``[B, N, H, 2F]``, in their dtype (float32 for float16)."""
        x = x if x.shape[-1] == self.head_dim else x[..., -self.head_dim :]
        return project_softmax_halves(x, getattr(self, name))

    def near(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries and keys as `mix` has them the rotated ones, which softmax sees."""
        return q[..., : self.head_dim], k[..., : self.head_dim]

    def feature_pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ_q of q and φ_k of k, rotated if `far_rotary`, both for each query head: ``[B, N, H, 2F]``."""
        return self.features("W_q", q), self.features("W_k", k)

    def weigh(self, fq: Tensor, fk: Tensor, scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Weights ``[B, H, n, m]`` of some queries and keys at positions i ``[n, 1]`` and j ``[1, m]``.

        Args:
            fq, fk: features ``[B, H, ·, 2F]``.
            scores: q·k / √D, −inf where a query does not see a key.
        """
        far = (j < self.past_of(i)) & (j >= self.sinks)
        near = scores.masked_fill(far, -torch.inf)
        g = self.window_factor.to(fq.dtype).sigmoid()[:, None, None]
        past = (fq @ fk.mT).where(far & (scores > -torch.inf), 0.0)
        a = g * (near - near.amax(-1, keepdim=True)).exp() + (past * (1 - g) if self.affine_factors else past)
        return a / a.sum(-1, keepdim=True)

    def layout(self, n: int, m: int) -> Layout:
        """The keys of the softmax part."""
        return Layout.window(n, self.window, self.sinks, m) if self.window_form == "sw" else Layout.terrace(n, self.window, m)

    def past_of(self, position: Tensor) -> Tensor:
        """The first key position that a query's window reaches; all before it but the sinks are its past."""
        w = self.window
        return position - w + 1 if self.window_form == "sw" else (position // w - 1) * w

    def combine(self, near: Near, far: Tensor, mass: Tensor, dtype: torch.dtype) -> Tensor:
        """One normaliser over the window's (o, lse, max) and the past's sums ``[B, M, H, V]`` and weights ``[B, M, H, 1]``."""
        return merge_sums(near, far, mass, self.window_factor, affine=self.affine_factors, dtype=dtype)

    def stretched(self, by: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Options and parameters, in float64, for contexts s = `by` times as long as those taught: W ← s^0.09 W, g ← s^(2/3) g beside f.

        The past weighs as much as all of its keys together, so that s times as many outweigh the window and the one key that was meant;
        sharper features keep that key above the others, a heavier window keeps its share of the normaliser. This library's own.
        """
        factor = self.window_factor.detach().to(torch.float64)
        if not self.affine_factors:  # g beside 1 is what σ(log g) beside 1 − σ(log g) is
            factor = F.logsigmoid(factor)
        maps = {name: getattr(self, name).detach().to(torch.float64) * by**SHARPER for name in ("W_q", "W_k")}
        return {"affine_factors": True}, {"window_factor": factor + HEAVIER * math.log(by), **maps}


def forward(module: Lolcats, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Any number of tokens, from the start or behind a state, in a batch or packed; linear in the tokens.

    Without `far_rotary`, q and k have what is turned and what is not side by side.
    """
    dtype, device, cu = compute_dtype(q), q.device, call.cu_seqlens
    if call.state is None:
        layout = module.layout(q.shape[1], q.shape[1])
        near = sparse_attention(*module.near(q, k), v, layout, cu_seqlens=cu, return_lse=True, return_max=True)
    rows = q.shape[0] if cu is None else cu.shape[0] - 1
    if call.state is None:
        length = torch.zeros(rows, dtype=torch.long, device=device)
        held = [x.new_zeros(rows, module.held, *x.shape[2:]) for x in (k, v)]
        sums = torch.zeros(rows, module.heads, 2 * module.feature_dim, v.shape[-1] + 1, dtype=dtype, device=device)
    else:
        length, held, sums = call.state.length, [call.state["k"], call.state["v"]], call.state["S"]
    stream = Stream(module.held, rows, q.shape[1], cu, device)
    joined = stream.join(held[0], k), stream.join(held[1], v)
    if call.state is not None:
        near = attend_behind(*module.near(q, joined[0]), joined[1], module.layout, stream, length, module.sinks)
    past = sliding_past if module.window_form == "sw" else terrace_past
    far, mass, sums = past(module, q, *joined, stream, length, sums, cu)
    o = module.combine(near, far, mass, q.dtype)
    if not call.return_state:
        return o, None
    kept = [stream.last(x, module.held - module.sinks) for x in joined]
    if module.sinks:
        first = [store(x[:, : module.sinks], new, length, module.sinks, cu) for x, new in zip(held, (k, v))]
        kept = [torch.cat(pair, 1) for pair in zip(first, kept)]
    return o, {"S": sums, "k": kept[0], "v": kept[1]}


def from_start(
    module: Lolcats, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], v: Tensor, return_state: bool
) -> tuple[Tensor, dict[str, Tensor] | None]:  # fmt: skip
    """A batch without a state: query i sees the keys up to i − w, so that later queries against earlier keys are a causal pass.

    The queries and keys that softmax sees, and those that φ maps, are read where they are; a state has both keys side by side.
    """
    (q, k), (far_q, far_k) = near, far
    n, w, sinks = q.shape[1], module.window, module.sinks
    late, layout = max(0, n - w - sinks), module.layout(n, n)  # queries with a past, and keys in it
    past = slice(sinks, sinks + late)
    far_q, past_k, maps = far_q[:, w + sinks :], far_k[:, past], (module.W_q, module.W_k)
    if as_defined(module) and serves_first(q, k, v, (far_q, past_k), maps, module.window_factor):
        from subquad.ops.window_step.first import first_call  # Triton is imported when it is first needed

        o, sums = first_call(
            q, k, v, (far_q, past_k), layout, maps, module.window_factor, sinks, module.affine_factors, return_state
        )  # fmt: skip
    else:
        by_softmax = sparse_attention(q, k, v, layout, return_lse=True, return_max=True)
        fq, fk = module.feature_pair(far_q, past_k)
        by_maps, mass, sums = linear_sums(fq, fk, v[:, past].to(fq.dtype), return_state=return_state)
        o = module.combine(by_softmax, by_maps, mass, q.dtype)
    if not return_state:
        return o, None
    keys, values = first_kept(k, v, None if module.far_rotary else far_k, sinks, w)
    return o, {"S": sums, "k": keys, "v": values}


def with_ones(v: Tensor, real: Tensor) -> Tensor:
    """Values and a column of ones, whose sums are the weights' own; both 0 where a token is not `real` ``[B|1, N]``."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1) * real[..., None, None]


def sliding_past(
    module: Lolcats, q: Tensor, k: Tensor, v: Tensor, stream: Stream, length: Tensor, sums: Tensor, cu_seqlens: Tensor | None
) -> Past:
    """Keys enter the past w tokens late: a causal pass over keys and values delayed by w gives it exactly."""
    w = module.window
    fq, fk = module.features("W_q", q), module.features("W_k", stream.delayed(k, w))
    real = (stream.positions(length) >= w + module.sinks)[..., None, None].to(fq.dtype)
    v = stream.delayed(v, w).to(fq.dtype) * real
    real = real.expand(*v.shape[:2], 1, 1)
    return linear_sums(fq, fk, v, counts=real, initial_state=sums, return_state=True, cu_seqlens=cu_seqlens)


def terrace_past(
    module: Lolcats, q: Tensor, k: Tensor, v: Tensor, stream: Stream, length: Tensor, sums: Tensor, cu_seqlens: Tensor | None
) -> Past:
    """All queries of a block of w see the same past, the blocks before the last: sums by block, then a running sum.

    Rows are laid out in whole blocks from position `length` − `late` − 2w on: 2w kept tokens, then the new ones.
    """
    w, device, late = module.window, q.device, (length % module.window)[:, None]
    count = torch.full_like(length, q.shape[1]) if cu_seqlens is None else cu_seqlens.diff().long()
    longest = q.shape[1] if cu_seqlens is None else int(count.max()) if count.numel() else 0
    blocks = -(-(longest + w - 1) // w)  # of queries

    def rows(x: Tensor, index: Tensor, offsets: Tensor | None) -> Tensor:
        """Tokens `index` ``[R, T]`` of every row, cut into blocks; index is clamped where there is no such token."""
        index = index.clamp(min=0)
        if offsets is None:
            taken = x[torch.arange(x.shape[0], device=device)[:, None], index.clamp(max=max(0, x.shape[1] - 1))]
        else:
            taken = x[0, (offsets[:-1, None].long() + index).clamp(max=x.shape[1] - 1)]
        return taken.unflatten(1, (-1, w))

    at = torch.arange((blocks + 2) * w, device=device) - late
    position = at + length[:, None] - 2 * w
    real = (at >= 0) & (at < 2 * w + count[:, None]) & (position >= module.past_of(length - 1)[:, None].clamp(min=0))
    fk = module.features("W_k", rows(k, at, stream.cu_seqlens).flatten(1, 2)).to(sums.dtype).unflatten(1, (-1, w))
    v = v.to(sums.dtype)
    v = with_ones(rows(v, at, stream.cu_seqlens).flatten(1, 2), real)
    v = expand_heads(v, module.heads).unflatten(1, (-1, w))
    kv = torch.einsum("rbwhf,rbwhv->rbhfv", fk, v)
    before = torch.cat([sums[:, None], kv], 1).cumsum(1)  # before[:, b] holds all blocks below b
    left = (module.past_of(length + count - 1) - (length - late[:, 0] - 2 * w)) // w
    kept = before[torch.arange(left.shape[0], device=device), left]
    if not q.shape[1]:
        far = sums.new_zeros(*q.shape[:3], v.shape[-1])
        return far[..., :-1], far[..., -1:], kept
    fq = module.features("W_q", rows(q, at[:, 2 * w :] - 2 * w, cu_seqlens).flatten(1, 2)).to(sums.dtype).unflatten(1, (-1, w))
    far = torch.einsum("rbwhf,rbhfv->rbwhv", fq, before[:, 1 : blocks + 1]).flatten(1, 2)
    if cu_seqlens is None:
        token = torch.arange(longest, device=device) + late
        far = far[torch.arange(far.shape[0], device=device)[:, None], token]
    else:
        far = far[stream.row, stream.offset + late[stream.row, 0]][None]
    return far[..., :-1], far[..., -1:], kept


def step(module: Lolcats, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
    """One token: what leaves the window enters the sums, unless it is a sink, then the token sees both."""
    dtype, w, sinks = compute_dtype(q), module.window, module.sinks
    length = state.length[:, None]
    k, v = torch.cat([state["k"], k], 1), torch.cat([state["v"], v], 1)
    k_pos = torch.cat([kept_positions(state.length, module.held - sinks, sinks), length], 1)
    wide_q, wide_k, wide_v = (x.to(dtype) for x in (*module.near(q, k), v))
    leaving = slice(sinks, sinks + (1 if module.window_form == "sw" else w))
    real = k_pos[:, leaving] >= sinks
    real = real if module.window_form == "sw" else real & (length % w == 0)
    gone = expand_heads(with_ones(wide_v[:, leaving], real), module.heads)
    sums = state["S"] + module.features("W_k", k[:, leaving]).to(dtype).permute(0, 2, 3, 1) @ gone.transpose(1, 2)
    layout = module.layout(1, module.held + 1)
    near = sparse_attention(wide_q, wide_k, wide_v, layout, q_pos=length, k_pos=k_pos, return_lse=True, return_max=True)
    far = (module.features("W_q", q).to(dtype).transpose(1, 2) @ sums).transpose(1, 2)
    o = module.combine(near, far[..., :-1], far[..., -1:], q.dtype)
    if not sinks:
        return o, {"S": sums, "k": k[:, 1:], "v": v[:, 1:]}
    here = (torch.arange(sinks, device=q.device) == length)[..., None, None]
    k, v = (torch.cat([x[:, -1:].where(here, x[:, :sinks]), x[:, sinks + 1 :]], 1) for x in (k, v))
    return o, {"S": sums, "k": k, "v": v}


def as_defined(module: Lolcats) -> bool:
    """Whether kernels may stand for the module's methods, which they do not call: no subclass has others."""
    names, cls = ("features", "feature_pair", "combine", "layout"), type(module)
    return cls is Lolcats or all(getattr(cls, name) is getattr(Lolcats, name) for name in names)


def kernel_serves(module: Lolcats, q: Tensor, k: Tensor, v: Tensor, state: State) -> bool:
    """Whether `kernel_step` has this call, of window form "sw"; q and k are turned, as angles may ask for gradients too."""
    tensors = (state["k"], state["v"]), state["S"], (module.W_q, module.W_k), module.window_factor
    return as_defined(module) and serves(q, k, v, *tensors)


def kernel_step(
    module: Lolcats, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], v: Tensor, state: State
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """`step` as one kernel, of q and k for the window and for the past.

    Raises:
        InputError: a state of other sizes, as of another window, made by hand: the kernel would read past its ends.
    """
    keys = module.head_dim * (1 if module.far_rotary else 2)
    sizes = {"S": (module.heads, 2 * module.feature_dim, module.value_dim + 1)}
    sizes |= {name: (module.held, module.kv_heads, width) for name, width in (("k", keys), ("v", module.value_dim))}
    for name, size in sizes.items():
        check_tensor(f"state[{name!r}]", state[name], (v.shape[0], *size), v)
    o, (k, v), sums = window_step(
        *near, v, (state["k"], state["v"]), state["S"], state.length, (module.W_q, module.W_k), module.window_factor,
        sinks=module.sinks, affine=module.affine_factors, far=None if module.far_rotary else far,
    )  # fmt: skip
    return o, {"S": sums, "k": k, "v": v}


def reference(module: Lolcats, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    plain, (q, k) = (q, k), rotate(rotary, q, k)
    far_q, far_k = (q, k) if module.far_rotary else plain
    y_q, y_k = torch.einsum("bnhd,hdf->bnhf", far_q, module.W_q), torch.einsum("bnhd,hdf->bnhf", far_k, module.W_k)
    fq, fk = (torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12) for y in (y_q, y_k))
    i, w = torch.arange(q.shape[1], device=q.device)[:, None], module.window
    j, start = i.T, i - w + 1 if module.window_form == "sw" else (i // w - 1) * w
    near, far = (j <= i) & ((j >= start) | (j < module.sinks)), (j < start) & (j >= module.sinks)
    s = (torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5).masked_fill(~near, -torch.inf)
    g = module.window_factor.sigmoid()[:, None, None]
    a = g * (s - s.amax(-1, keepdim=True)).exp() if s.numel() else s
    a = a + (1 - g if module.affine_factors else 1) * far * torch.einsum("bnhf,bmhf->bhnm", fq, fk)
    return torch.einsum("bhnm,bmhv->bnhv", a / a.sum(-1, keepdim=True), v)
