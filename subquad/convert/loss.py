"""Losses of fine-tuning, summed over what is predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from subquad.checks import InputError, shape_of

ROWS = 256  # places whose logits are in float32 at once: what a GPU's cache holds
NOTHING = -100  # the label of a place that predicts nothing


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, summed over the places where `labels` is not -100, in float32 or float64.

    Of 16-bit logits there is never a float32 copy, nor one of their
    logarithms, which for large vocabularies take more than the model.

    Args:
        logits: ``[B, N, V]``.
        labels: ``[B, N − 1]``, what all places but the last predict.
    """
    labels = F.pad(labels, (0, 1), value=NOTHING)  # so that the logits need not be cut, which would copy them
    total: Tensor = _NextToken.apply(logits.flatten(0, -2), labels.flatten())
    return total


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        there = labels != NOTHING
        at = labels.where(there, 0)[:, None]
        sums = torch.empty(labels.shape, dtype=wide, device=logits.device)  # log Σ exp
        for some, into in zip(logits.split(ROWS), sums.split(ROWS)):
            into.copy_(some.to(wide).logsumexp(-1))
        ctx.save_for_backward(logits, sums, there, at)
        return (sums - logits.gather(1, at)[:, 0]).where(there, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, sums, there, at = ctx.saved_tensors
        made = torch.empty_like(logits)
        weight = (there * grad)[:, None]
        for some, one, by, label, into in zip(*(x.split(ROWS) for x in (logits, sums[:, None], weight, at, made))):
            share = (some.to(sums.dtype) - one).exp_()
            into.copy_(share.scatter_add_(1, label, share.new_full(label.shape, -1.0)).mul_(by))
        return made, None


def labels_of(batch: dict[str, Any]) -> Tensor:
    """What is predicted at each place but the last, ``[B, N − 1]``: -100 where nothing is."""
    if not isinstance(batch.get("input_ids"), Tensor):
        raise InputError("data", f"a batch of {', '.join(batch)}", "batches with input_ids [B, N]")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels", ids)
    if labels.shape != ids.shape:
        raise InputError("data", f"a batch with labels {shape_of(labels)}", f"{list(ids.shape)}, as its input_ids")
    labels = labels[:, 1:]
    if mask is None:
        return labels
    return labels.where((mask[:, 1:] != 0) & (mask[:, :-1] != 0), NOTHING)


def divergence(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Of the student from the teacher, summed over the places where `labels` is not -100, in float32 or float64.

    What stands at other places, numbers or not, counts nothing. Of 16-bit logits there is never a float32 copy; `target` gets no gradient.

    Args:
        logits: ``[B, N, V]``.
        labels: ``[B, N − 1]``, what all places but the last predict.
        target: the teacher's logits ``[B, N, V]``.
    """
    there = F.pad(labels, (0, 1), value=NOTHING).flatten() != NOTHING
    total: Tensor = _Divergence.apply(logits.flatten(0, -2), target.flatten(0, -2), there)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, there: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        sums = torch.empty(2, logits.shape[0], dtype=wide, device=logits.device)  # log Σ exp of both
        away = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        for some, other, one, two, into in zip(*(x.split(ROWS) for x in (logits, target, *sums, away))):
            some, other = some.to(wide), other.to(wide)
            one.copy_(some.logsumexp(-1))
            two.copy_(other.logsumexp(-1))
            apart = other - two[:, None]
            share, apart = apart.exp(), apart - (some - one[:, None])
            into.copy_((share * apart.masked_fill(share == 0, 0.0)).sum(-1))  # a logit of -inf says that a token never comes
        ctx.save_for_backward(logits, target, sums, there)
        return away.where(there, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, target, sums, there = ctx.saved_tensors
        made = torch.empty_like(logits)
        for some, other, one, two, seen, into in zip(*(x.split(ROWS) for x in (logits, target, *sums[..., None], there[:, None], made))):
            share = (some.to(sums.dtype) - one).exp_().sub_((other.to(sums.dtype) - two).exp_())
            into.copy_(share.mul_(grad).masked_fill_(~seen, 0.0))  # a weight of 0 would leave what is no number
        return made, None, None
