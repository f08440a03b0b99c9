"""What `kernels.py` measures: the forms of the recurrences, their inputs, shapes and floors, and the peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from subquad.ops.delta import delta_rule
from subquad.ops.linear import linear_attention

Shape = tuple[int, int, int, int]  # batch, tokens, heads, head dim
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A recurrence: the linear one or the delta rule, with decays "none", per "head", per "token" or per "channel"."""

    decay: str
    delta: bool = False

    def __call__(self, x: Inputs, **options: Any) -> Any:
        given = {"log_decay": x.get("log_decay"), "initial_state": x.get("initial_state"), **options}
        if self.delta:
            return delta_rule(x["q"], x["k"], x["v"], x["beta"], **given)
        return linear_attention(x["q"], x["k"], x["v"], **given)


FORMS = {
    "linear": Form("none"),
    "linear per head": Form("head"),
    "linear per token": Form("token"),
    "linear per channel": Form("channel"),
    "delta": Form("none", delta=True),
    "gated delta": Form("token", delta=True),
}


def inputs(form: Form, shape: Shape, device: Any, dtype: torch.dtype = torch.bfloat16, *, state: bool = False) -> Inputs:
    """q, k, v and what else the form takes; keys of length 1, decays in float32."""
    b, n, h, d = shape
    torch.manual_seed(0)
    x = {name: F.normalize(torch.randn(shape, device=device, dtype=dtype), dim=-1) for name in "qk"}
    x["v"] = torch.randn(shape, device=device, dtype=dtype)
    if form.delta:
        x["beta"] = torch.rand(b, n, h, device=device, dtype=dtype)
    if form.decay == "head":
        x["log_decay"] = -torch.logspace(-3, -1, h, device=device)
    elif form.decay != "none":
        x["log_decay"] = torch.rand((b, n, h, d)[: 4 if form.decay == "channel" else 3], device=device).mul_(-0.1)
    if state:
        x["initial_state"] = torch.randn(b, h, d, d, device=device)
    return x


def leaves(form: Form, x: Inputs) -> Inputs:
    """The inputs with a gradient to each that a model learns; decays per head are constants."""
    fixed = ("log_decay",) if form.decay == "head" else ()
    return {name: t.detach().requires_grad_(name not in fixed) for name, t in x.items()}


def floor_bytes(x: Inputs) -> tuple[int, int]:
    """Bytes that must move once, forward, and forward and backward: all inputs read and o written; then all inputs and
    o's gradient read and the inputs' gradients written."""
    read, out = sum(t.nbytes for t in x.values()), x["v"].nbytes
    learned = sum(t.nbytes for t in x.values() if t.requires_grad)
    return read + out, 2 * (read + out) + learned


FLAT, NARROW = (8, 2048, 16, 128), (16, 2048, 16, 64)
FEW, LONG = (2, 8192, 16, 128), (1, 32768, 16, 128)
LONGER, LONGEST = (1, 131072, 4, 128), (1, 1048576, 4, 128)
STATES: Shape = (256, 1, 16, 128)  # of the decode step
TIMED: list[tuple[Shape, list[str]]] = [
    (FLAT, list(FORMS)),
    (NARROW, list(FORMS)),
    (FEW, ["linear", "linear per token"]),
    (LONG, ["linear", "linear per token"]),
    (LONGER, ["linear", "linear per token"]),
    (LONGEST, ["linear", "linear per token"]),
]


# ---- peers -------------------------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    """Causal softmax attention by one of torch's backends."""

    def attend(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


SOFTMAX = {"cuDNN softmax": sdpa(SDPBackend.CUDNN_ATTENTION), "FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION)}


def fla(name: str, **fixed: Any) -> Callable[[Inputs], Tensor]:
    """An operator of flash-linear-attention, imported when it is called."""

    def attend(x: Inputs) -> Tensor:
        function = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
        gates = {theirs: x[ours] for theirs, ours in (("g", "log_decay"), ("beta", "beta")) if ours in x}
        if name == "lightning_attn":  # makes its decays from the layer's place
            gates = {}
        return function(x["q"], x["k"], x["v"], **gates, **fixed)[0]

    return attend


PEERS = {  # by name: the form it computes, and the call
    "linear_attn": ("linear", fla("linear_attn", normalize=False)),
    "lightning_attn": ("linear per head", fla("lightning_attn", layer_idx=0, num_layers=12)),
    "simple_gla": ("linear per token", fla("simple_gla")),
    "gla": ("linear per channel", fla("gla")),
    "delta_rule": ("delta", fla("delta_rule")),
    "gated_delta_rule": ("gated delta", fla("gated_delta_rule")),
}
