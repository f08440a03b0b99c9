"""Hedgehog's objective: the weights of linear attention taught to be softmax's, without a matrix of N × N.

    loss = − 1/(H N) Σ_hi Σ_j p_hij log max(a_hij, 1e-12)         p softmax's weights, a the mechanism's, over the same q and k

It is smallest, the entropy of p, where a = p. Queries are taken in tiles with all keys that they see; the backward pass makes
each tile again. So time is quadratic in N, and memory linear.

Zhang, Bhatia, Kumbong, Ré: The Hedgehog & the Porcupine (arXiv 2402.04347), sec. 4.2; the floor is that of LoLCATs' code
(arXiv 2410.10254).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.checks import InputError, compute_dtype
from subquad.contract import Attention, mechanisms
from subquad.contract import mechanism as class_of
from subquad.convert.module import SwappedAttention
from subquad.ops.common import expand_heads
from subquad.rotary import Rotary, rotate

BUDGET = {"cpu": 2**20, "cuda": 2**25}  # weights in a tile; a handful of tensors of that size live at once
FLOOR = 1e-12


class Weighing(Protocol):
    """What a mechanism offers that can be taught by its weights."""

    heads: int

    def feature_pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of rotated q and k, ``[B, N, H, F]`` each."""
        ...

    def weigh(self, fq: Tensor, fk: Tensor, scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Weights ``[B, H, n, m]``, each row's sum 1, of n queries and m keys.

        Args:
            fq, fk: their features, ``[B, H, n, F]`` and ``[B, H, m, F]``.
            scores: q·k / √D, −inf where a query does not see a key.
            i, j: positions, ``[n, 1]`` and ``[1, m]``.
        """
        ...


def weighing() -> list[str]:
    """The mechanisms that can be taught by their weights."""
    return [name for name in mechanisms() if hasattr(class_of(name), "weigh")]


def weights_loss(mechanism: Attention, q: Tensor, k: Tensor, *, rotary: Rotary | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Cross-entropy of a mechanism's attention weights under softmax's, a mean over queries and heads.

    Only the mechanism's parameters get gradients; q and k are taken as given.

    Args:
        mechanism: one of `weighing()`; if it is causal, so is the softmax.
        q, k: ``[B, N, H, D]``, unrotated; the heads of k divide those of q.
        rotary: their angles.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences.

    Raises:
        InputError: a mechanism whose weights are not known.
    """
    if not hasattr(mechanism, "weigh"):
        raise InputError("objective", f"'weights' for {mechanism.card.name}", f"a mechanism with feature maps: {', '.join(weighing())}")
    student: Any = mechanism
    with torch.no_grad():
        given = (*rotate(rotary, q, k), *(() if getattr(student, "far_rotary", True) else (q, k)))
        given = tuple(x.to(compute_dtype(x)) for x in given)
        if cu_seqlens is None:
            lengths = torch.full((q.shape[0],), q.shape[1], device=q.device)
        else:
            lengths = cu_seqlens.diff().long()
            given = tuple(_rows(x, lengths) for x in given)
        q, k = given[:2]
    causal = getattr(mechanism, "causal", mechanism.card.causal)
    fq, fk = (x.transpose(1, 2) for x in student.feature_pair(*given[-2:]))
    q, k = q.transpose(1, 2) * mechanism.head_dim**-0.5, expand_heads(k, mechanism.heads).transpose(1, 2)
    rows, heads, tokens = q.shape[:3]
    size = max(1, BUDGET["cuda" if q.is_cuda else "cpu"] // max(1, rows * heads * tokens))
    total = fq.new_zeros(())
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        seen = stop if causal else tokens
        total = total + checkpoint(
            _tile, student, fq[:, :, start:stop], fk[:, :, :seen], q[:, :, start:stop], k[:, :, :seen], start, lengths, causal,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / (heads * lengths.sum().clamp_min(1))


def _tile(student: Weighing, fq: Tensor, fk: Tensor, q: Tensor, k: Tensor, start: int, lengths: Tensor, causal: bool) -> Tensor:
    """The summed cross-entropy of some queries, from position `start` on."""
    i = torch.arange(start, start + q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None]
    real = lengths[:, None, None, None]
    # Rows end in padding: causal queries before it do not see it. An empty row sees a key, lest its softmax be not a number.
    seen = j <= i if causal else j < real.clamp_min(1)
    scores = (q @ k.mT).masked_fill(~seen, -torch.inf)
    entropy = -(scores.softmax(-1) * student.weigh(fq, fk, scores, i, j).clamp_min(FLOOR).log()).sum(-1)
    return entropy.where(i[:, 0] < real[..., 0], 0.0).sum()


def _rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Packed ``[1, total, …]`` as rows ``[S, longest, …]``, zero behind their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(x[0].split(lengths.tolist())), batch_first=True)


def pupil_loss(pupil: SwappedAttention, args: Any, kwargs: Any) -> Tensor:
    """`weights_loss` on the queries and keys that a swapped layer's mechanism is given in a call."""
    with _caught(pupil.mechanism) as calls, torch.no_grad():
        pupil.heads_output(*args, **kwargs)
    (given,) = calls
    return weights_loss(pupil.mechanism, **given)


def check_pupil(pupil: SwappedAttention, length: int | None = None) -> None:
    """Refuse a layer whose mechanism's weights, or whose original's softmax, are not those of q·k / √D.

    Args:
        length: of the sequences to learn from, if it is known: a window that holds them whole leaves nothing out.
    """
    if not hasattr(pupil.mechanism, "weigh"):
        raise InputError("objective", f"'weights' for {pupil.name}", f"'output', or a mechanism of: {', '.join(weighing())}")
    owner = pupil.original if hasattr(pupil.original, "sliding_window") else getattr(pupil.original, "config", None)
    window = getattr(owner, "sliding_window", None)
    if not pupil.plain_softmax:
        was = f"'weights' for {pupil.path}, whose original has a position bias"
        raise InputError("objective", was, "'output': the weights to learn from are those of plain softmax")
    if window is not None and (length is None or length > window):
        text = "for batches of any length" if length is None else f"for a length of {length}"
        was = f"'weights' for {pupil.path}, whose original has a window of {window}, {text}"
        should = f"'output', or token ids and a length of at most {window}: the weights to learn from are those of plain softmax"
        raise InputError("objective", was, should)


@contextlib.contextmanager
def _caught(mechanism: Attention) -> Iterator[list[dict[str, Any]]]:
    """Calls of a mechanism caught instead of made."""
    calls: list[dict[str, Any]] = []

    def note(q: Tensor, k: Tensor, v: Tensor, *, rotary: Any = None, cu_seqlens: Any = None, **rest: Any) -> Tensor:
        calls.append({"q": q, "k": k, "rotary": rotary, "cu_seqlens": cu_seqlens})
        return v.new_zeros(*q.shape[:3], v.shape[-1])

    mechanism.__dict__["forward"] = note
    try:
        yield calls
    finally:
        del mechanism.__dict__["forward"]
