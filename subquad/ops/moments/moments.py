"""Moments: what bidirectional linear attention keeps of keys and values, and how two of them are joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of

KERNEL_MAPS = ("identity", "elu1", "relu", "exp", "silu", "sign_cube", "norm_power")  # feature maps that the Triton kernels know
TWO_SIGNS = ("sign_cube", "norm_power")  # those with a copy of the channels for each sign


@dataclass(frozen=True)
class Moments:
    """Sums over tokens j under weights w_j = key_weights_j · exp(logit_j − logit_max), in float32 or float64.

    R rows: one per batch row or packed sequence. A row that sees no key has M = z = v_sum = weight = 0 and
    logit_max = −inf, and adds nothing when merged.

    Args:
        M: Σ w R(φ(k)) vᵀ ``[R, H, F, V]`` (R: rotary, if any).
        z: Σ w φ(k) ``[R, H, F]``.
        v_sum: Σ w v ``[R, H, V]``; None for weights per channel.
        weight: Σ w ``[R, H]``, or ``[R, H, F]`` for weights per channel.
        logit_max: the largest logit, shaped as `weight`; a constant to autograd, as no result depends on it.
        block_q: if set, all of these have a further dimension ``[R, Q, H, …]``, one entry per block of block_q queries.
        rotated: whether M holds rotated features.
    """

    M: Tensor
    z: Tensor
    v_sum: Tensor | None
    weight: Tensor
    logit_max: Tensor
    block_q: int | None = None
    rotated: bool = False

    @property
    def per_channel(self) -> bool:
        return self.weight.dim() == self.z.dim()

    def merge(self, other: Moments) -> Moments:
        """The moments over the keys of both.

        Raises:
            InputError: they differ in shape, or hold rotated features under weights per channel (which no factor can rescale).
        """
        if (self.M.shape, self.weight.shape, self.block_q) != (other.M.shape, other.weight.shape, other.block_q):
            raise InputError("other", f"M {shape_of(other.M)}, block_q {other.block_q}", f"M {shape_of(self.M)}, block_q {self.block_q}")
        if self.per_channel and self.rotated:
            raise InputError("other", "rotated moments with logits per channel", "moments gathered in one call: these do not merge")
        return merge_scaled(self, other)

    def map(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """`change` applied to every sum and to logit_max."""
        v_sum = None if self.v_sum is None else change(self.v_sum)
        return replace(
            self, M=change(self.M), z=change(self.z), v_sum=v_sum, weight=change(self.weight), logit_max=change(self.logit_max)
        )  # fmt: skip

    def scaled(self, factor: Tensor) -> Moments:
        """Every sum times `factor`, shaped as `weight`."""
        per_row = factor if self.per_channel else factor[..., None]
        v_sum = None if self.v_sum is None else self.v_sum * per_row
        return replace(self, M=self.M * per_row[..., None], z=self.z * per_row, v_sum=v_sum, weight=self.weight * factor)


def finite(logit_max: Tensor) -> Tensor:
    """The shift of logits: their maximum, or 0 where there is no key."""
    return logit_max.where(logit_max > -torch.inf, 0)


def merge_scaled(a: Moments, b: Moments) -> Moments:
    """Both brought to the larger logit_max and added."""
    top = torch.maximum(a.logit_max, b.logit_max)
    shift = finite(top)
    a, b = a.scaled((a.logit_max - shift).exp()), b.scaled((b.logit_max - shift).exp())
    v_sum = None if a.v_sum is None or b.v_sum is None else a.v_sum + b.v_sum
    return replace(a, M=a.M + b.M, z=a.z + b.z, v_sum=v_sum, weight=a.weight + b.weight, logit_max=top)
