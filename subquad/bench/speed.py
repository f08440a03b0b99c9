"""What a change of attention gains: prefill and decode times, bytes kept per sequence, parameters and FLOPs.

A model is read through its modules: every `Attention` in it is a swapped layer with a card; the other layers of the
configuration keep keys and values, which is the card of `softmax`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad import contract
from subquad.bench.machine import peak_bytes, synchronize
from subquad.bench.progress import bar
from subquad.bench.quality import device_of, evaluating
from subquad.contract import Attention, Card, Shape

_LONG = 2.0  # seconds: a prefill this long is not repeated
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model, as its card and options describe it."""

    card: Card
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    options: dict[str, Any]

    def shape(self, tokens: int, itemsize: int) -> Shape:
        return Shape(tokens, self.heads, self.head_dim, self.kv_heads, self.value_dim, itemsize=itemsize)

    def cost(self, what: str, tokens: int, itemsize: int) -> float:
        """`flops`, `bytes_moved` or `state_bytes` of one sequence."""
        return card_cost(getattr(self.card, what), self.shape(tokens, itemsize), self.options)


def card_cost(function: Callable[..., float], shape: Shape, options: dict[str, Any]) -> float:
    """A card's cost at a shape, handed those options that it depends on."""
    takes = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return float(function(shape, **options))
    return float(function(shape, **{name: value for name, value in options.items() if name in takes}))


def outermost(model: nn.Module) -> list[Attention]:
    """The mechanisms of a model, without those that are parts of another mechanism."""
    found: list[Attention] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, Attention):
                found.append(child)
            else:
                walk(child)

    walk(model)
    return found


def attention_layers(model: Any) -> list[Layer]:
    """Every attention layer of a transformers decoder, in order."""
    config = model.config.get_text_config()
    swapped = {m.layer[0]: Layer(m.card, m.heads, m.kv_heads, m.head_dim, m.value_dim, m.options) for m in outermost(model)}
    return [swapped.get(index) or _kept_layer(config, index) for index in range(config.num_hidden_layers)]


def _kept_layer(config: Any, index: int) -> Layer:
    """A layer as transformers made it: softmax over all keys, or over a window where the configuration says so."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window and (kinds is None or kinds[index] == "sliding_attention"):
        return Layer(contract.card("sliding-window"), heads, kv_heads, head_dim, head_dim, {"window": window, "sinks": 0})
    return Layer(contract.card("softmax"), heads, kv_heads, head_dim, head_dim, {})


def itemsize_of(model: Any) -> int:
    return torch.finfo(next(model.parameters()).dtype).bits // 8


def kept_bytes(model: Any, lengths: Sequence[int] = LENGTHS) -> dict[int, int]:
    """Bytes kept per sequence after each length, from the cards (what a cache of that length would hold)."""
    layers, size = attention_layers(model), itemsize_of(model)
    return {n: round(sum(layer.cost("state_bytes", n, size) for layer in layers)) for n in lengths}


def pairs_seen(model: Any, tokens: int) -> float | None:
    """The share of the pairs of a token with itself or one before it that is seen, mean over layers.

    None where a layer does not name the keys that a token sees, as linear attention does not.
    """
    modules = {m.layer[0]: m for m in outermost(model)}
    found: dict[str, float | None] = {}
    shares = []
    for index, layer in enumerate(attention_layers(model)):
        sizes = {"heads": layer.heads, "head_dim": layer.head_dim, "kv_heads": layer.kv_heads, **layer.options}
        key = f"{layer.card.name}: {sizes}"
        if key not in found:
            found[key] = _share(modules.get(index) or contract.attention(layer.card.name, **sizes), tokens)
        shares.append(found[key])
    return None if None in shares else sum(share for share in shares if share is not None) / len(shares)


def _share(module: Attention, tokens: int) -> float | None:
    if module.card.family == "exact":
        return 1.0
    make: Any = getattr(module, "layout", None)  # of sparse mechanisms whose keys follow from the number of tokens alone
    if module.card.family != "sparse" or make is None or list(inspect.signature(make).parameters)[:1] != ["n"]:
        return None
    return make(tokens).density * 2 * tokens / (tokens + 1)


def kept_sentence(model: Any, tokens: int = 65536) -> str:
    """What the model keeps per sequence after `tokens` tokens, in one sentence from the cards."""
    groups: dict[str, int] = {}
    size = itemsize_of(model)
    for layer in attention_layers(model):
        words = f"{layer.card.name} keeps {layer.card.kept(layer.shape(tokens, size), **layer.options)}"
        groups[words] = groups.get(words, 0) + 1
    total = kept_bytes(model, [tokens])[tokens]
    parts = "; ".join(f"in {count} layer{'s' if count > 1 else ''}, {words}" for words, count in groups.items())
    return f"At {tokens:,} tokens it keeps {bytes_text(total)} per sequence: {parts}."


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors a cache holds, measured: `nbytes` of ours, keys and values of transformers' own."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def prefill_flops(model: Any, tokens: int) -> float:
    """FLOPs of one sequence's forward pass: two per weight of each linear layer and token, and each card's own."""
    inside = {id(part) for mechanism in outermost(model) for part in mechanism.modules()}
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside)
    attention = sum(layer.cost("flops", tokens, itemsize_of(model)) for layer in attention_layers(model))
    return 2.0 * linear * tokens + attention


@dataclass(frozen=True)
class Timing:
    """Measured at one context length: a prefill of `tokens`, then `decoded` tokens one at a time."""

    tokens: int
    prefill_s: float
    decode_ms: float
    decoded: int
    cache_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.prefill_s


@torch.no_grad()
def timings(
    model: Any, tokens: Tensor, lengths: Sequence[int] = (256, 1024, 2048), *, decoded: int = 16, repeats: int = 2, progress: bool = False
) -> list[Timing]:
    """Prefill time (best of `repeats`, one where it is long), decode time (median of `decoded` steps), cache size at each length.

    `tokens` ``[T]`` are cut to each length, or repeated to reach it.
    """
    device, found = device_of(model), []
    with evaluating(model), bar("speed", len(lengths) * repeats, show=progress) as advance:
        _prefill(model, _cut(tokens, min(*lengths, 64)).to(device))  # the first call pays for warming up
        for length in lengths:
            ids, best = _cut(tokens, length).to(device), float("inf")
            for _ in range(repeats):
                synchronize(device)
                begin = time.perf_counter()
                out = _prefill(model, ids)
                synchronize(device)
                spent = time.perf_counter() - begin
                best = min(best, spent)
                advance()
                if spent > _LONG:
                    break
            size = cache_bytes(*cached(out).values())
            found.append(Timing(length, best, _decode_ms(model, out, decoded), decoded, size))
    return found


@torch.no_grad()
def prefill_memory(model: Any, tokens: Tensor, length: int) -> int:
    """The most bytes that reading a prompt takes beyond the weights: activations and what is kept."""
    device = device_of(model)
    ids = _cut(tokens, length).to(device)
    with evaluating(model):
        return peak_bytes(lambda: _prefill(model, ids), device)


def _cut(tokens: Tensor, length: int) -> Tensor:
    return tokens.repeat(-(-length // tokens.numel()))[:length][None]


def _prefill(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def cached(out: Any) -> dict[str, Any]:
    """What a model keeps, as the argument of its next call."""
    from subquad.convert.cache import CACHE

    return {CACHE: out[CACHE]}


def _decode_ms(model: Any, out: Any, decoded: int) -> float:
    spent, device = [], device_of(model)
    for _ in range(decoded):
        token = out.logits[:, -1:].argmax(-1)
        synchronize(device)
        begin = time.perf_counter()
        out = model(input_ids=token, use_cache=True, **cached(out))
        synchronize(device)
        spent.append(time.perf_counter() - begin)
    return 1e3 * sorted(spent)[len(spent) // 2]


def bytes_text(count: float) -> str:
    """Bytes with a binary unit and three figures."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
