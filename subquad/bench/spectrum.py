"""`subquad spectrum`: the ranks of what attention keeps and gives, layer by layer, for several mechanisms on the same q, k and v.

The analysis of the RALA paper (arXiv 2411.07635, sec. 3). Of linear attention's key–value buffer ``[F, V]`` and of each head's
output ``[N, V]``, and of the output of all heads side by side ``[N, H·V]``:

    numerical rank   singular values above rtol times the largest
    effective rank   exp(−Σ p log p), p the singular values over their sum (Roy, Vetterli: EUSIPCO 2007)

q, k and v are those of the model's own forward pass, so that mechanisms are compared on equal inputs, each layer for itself;
class tokens are tokens like any other. A Swin computes its own attention, windows, shifts and bias included, but its q, k and v are
looked at over the whole image, as `swap` has mechanisms work on them; softmax beside them is then neither windowed nor biased.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.bench.progress import bar
from subquad.checks import InputError
from subquad.contract import Attention, attention, card
from subquad.convert.swap import find_host, swap
from subquad.convert.windows import SwappedWindowAttention
from subquad.ops.moments import gather_moments, mean_features
from subquad.rotary import Rotary

DEFAULT = ("softmax", "linear-relu", "linear-elu", "rala", "mala", "nalaformer", "inline", "l2vit", "lightnet")
LEAST = 1e-6  # what is left of smaller singular values of float32 matrices is rounding
Spectrum = tuple[float, float]  # numerical and effective rank


@dataclass(frozen=True)
class Layer:
    """What one attention layer was given: q ``[B, N, H, D]``, k and v, and its rotary."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None


@dataclass(frozen=True)
class Ranks:
    """Means over images and heads. `buffer` is None where there is none or it is not known here; `most` is the largest rank that a
    head can have."""

    layer: str
    mechanism: str
    buffer: Spectrum | None
    head: Spectrum
    features: Spectrum
    most: int


# The weighted features of keys that enter the buffer, by mechanism, as arguments of `gather_moments`.
BUFFERS: dict[str, Callable[[Layer, Any], dict[str, Any]]] = {
    "linear-elu": lambda *_: {"feature_map": "elu1"},
    "linear-relu": lambda *_: {"feature_map": "relu"},
    "rala": lambda layer, _: {"feature_map": "elu1", "global_query": mean_features(layer.q, "elu1"), "rotary": layer.rotary},
    "mala": lambda layer, _: {"feature_map": "elu1", "rotary": layer.rotary},
    "nalaformer": lambda layer, _: {"feature_map": "sign_cube", "rotary": layer.rotary},
    "inline": lambda _, module: {"feature_map": module.feature_map},
    "l2vit": lambda *_: {"feature_map": "relu"},
    "lightnet": lambda layer, _: {"key_logits": layer.k, "rotary": layer.rotary},
}


def buffer(layer: Layer, module: Attention) -> Tensor | None:
    """The key–value buffer ``[B, H, F, V]`` that a mechanism reads, up to a factor; None where there is none, or it is not known here."""
    name = module.card.name
    if name not in BUFFERS:
        return None
    moments = gather_moments(None if name == "lightnet" else layer.k, layer.v, **BUFFERS[name](layer, module))
    return moments.M / moments.weight[..., None] if moments.per_channel else moments.M


def ranks(x: Tensor, rtol: float = 0.01) -> Spectrum:
    """Numerical and effective rank of matrices ``[…, m, n]``, their mean over the leading dimensions.

    >>> ranks(torch.eye(4))
    (4.0, 4.0)
    """
    x = x.double()
    small = x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt().flip(-1)
    p = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    entropy = -(p * p.clamp(min=torch.finfo(x.dtype).tiny).log()).sum(-1)
    effective = entropy.exp().where(values[..., 0] > 0, 0)
    numerical = ((values > rtol * values[..., :1]) & (values > 0)).sum(-1).double()
    return round(float(numerical.mean()), 6), round(float(effective.mean()), 6)


@torch.no_grad()
def capture(model: nn.Module, pixels: Tensor) -> list[Layer]:
    """What each attention layer of a model is given on images ``[B, C, H, W]``.

    Layers of this library are watched as they are; a model without any is copied, and the copy's attention swapped to softmax,
    which computes the same (a Swin's in its windows; what it is given is joined to whole images).

    Raises:
        InputError: the model has no attention layer that can be watched.
    """
    if not any(isinstance(m, Attention) for m in model.modules()):
        model = copy.deepcopy(model)
        windowed = find_host(model).options  # a Swin's, of which only the windows compute the same
        swap(model, "softmax", causal=False, **({"scope": "window"} if windowed else {}))
    found: list[Layer] = []
    names = {
        m: re.sub(r"(\.(mechanism|attend|attn|attention))+$", "", name) for name, m in model.named_modules() if isinstance(m, Attention)
    }
    swin = {m: names.pop(m.mechanism) for m in model.modules() if isinstance(m, SwappedWindowAttention)}

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        q, k, v = args
        found.append(Layer(names[module], q.float(), k.float(), v.float(), kwargs.get("rotary")))  # type: ignore[index]

    def watch_windows(module: nn.Module, args: Any) -> None:
        assert isinstance(module, SwappedWindowAttention)
        q, k, v = (x.float() for x in module.project(module.windows().join(args[0]).flatten(1, 2)))
        found.append(Layer(swin[module], q, k, v, None))

    handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in names]
    handles += [m.register_forward_pre_hook(watch_windows) for m in swin]
    training = model.training
    try:
        model.eval()(pixels)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def check(mechanisms: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raises InputError for a mechanism that cannot stand in for bidirectional attention on q, k and v alone, or stands there twice."""
    for name, options in mechanisms:
        about = card(name)
        if not about.bidirectional or options.get("causal"):
            raise InputError("mechanisms", repr(label(name, options)), "bidirectional mechanisms: an image has no order")
        if about.needs_hidden:
            raise InputError("mechanisms", repr(name), "mechanisms that need q, k and v only")
        _make(name, options, 1, 16)
    labels = [label(*one) for one in mechanisms]
    if len(set(labels)) < len(labels):
        raise InputError("mechanisms", ", ".join(labels), "each mechanism, with its options, once")


def label(name: str, options: dict[str, Any]) -> str:
    """A mechanism with its options, as the command line names it."""
    return name + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")


def _make(name: str, options: dict[str, Any], heads: int, head_dim: int, **sizes: Any) -> Attention:
    mode = {"causal": False} if card(name).causal else {}
    return attention(name, heads, head_dim, **{**options, **mode, **sizes})


@torch.no_grad()
def spectrum(
    model: nn.Module,
    pixels: Tensor,
    mechanisms: Sequence[tuple[str, dict[str, Any]]] = tuple((name, {}) for name in DEFAULT),
    *,
    rtol: float = 0.01,
    progress: bool = False,
) -> list[Ranks]:
    """Ranks for each layer of the model and each mechanism, on images ``[B, C, H, W]``.

    Args:
        mechanisms: names and options; those with parameters have them as they are first made.
        rtol: singular values above this share of the largest count as rank; from 1e-6 to 1, as pixels are float32.
    """
    check(mechanisms)
    if not LEAST <= rtol < 1:
        raise InputError("rtol", rtol, f"a number from {LEAST:g} to 1")
    layers = capture(model, pixels)
    rows = []
    with bar("ranks", len(layers) * len(mechanisms), show=progress) as advance:
        for layer in layers:
            for name, options in mechanisms:
                rows.append(_ranks(layer, name, options, rtol))
                advance()
    return rows


def _ranks(layer: Layer, name: str, options: dict[str, Any], rtol: float) -> Ranks:
    q, k, v = layer.q, layer.k, layer.v
    module = _make(name, options, q.shape[2], q.shape[3], kv_heads=k.shape[2], value_dim=v.shape[3]).to(q.device)
    grid = {"grid": (1, q.shape[1])} if card(name).needs_grid else {}
    o = module(q, k, v, rotary=layer.rotary, **grid)
    kept = buffer(layer, module)
    spectra = ranks(o.transpose(1, 2), rtol), ranks(o.flatten(2), rtol)
    return Ranks(layer.name, label(name, options), None if kept is None else ranks(kept, rtol), *spectra, min(o.shape[1], o.shape[3]))
