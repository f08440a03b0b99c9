"""What `sparse.py` checks and times: layouts, biases, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.sparse import Layout, sparse_attention, sparse_attention_reference

Shape = tuple[int, int, int, int]  # batch, tokens, heads, head dim


class Speed(NamedTuple):
    """A layout that is timed, and the bars: how many times faster than FlexAttention, forward and forward + backward."""

    name: str
    shape: Shape
    layout: Callable[[], Layout]
    bars: tuple[float | None, float | None]


SPEEDS = [
    Speed("causal window 512", (2, 8192, 16, 128), lambda: Layout.window(8192, 512), (1.15, 1.0)),
    Speed("causal window 1024", (1, 32768, 16, 128), lambda: Layout.window(32768, 1024), (1.15, 1.0)),
    Speed("causal window 4096", (1, 32768, 16, 128), lambda: Layout.window(32768, 4096), (1.15, 1.0)),
    Speed("13 x 13 on 64 x 64", (4, 4096, 16, 64), lambda: Layout.neighborhood((64, 64), 13), (1.3, 1.25)),
    Speed("13 x 13 on 128 x 128", (1, 16384, 16, 64), lambda: Layout.neighborhood((128, 128), 13), (1.3, 1.25)),
    Speed("7 x 7 x 7 on 16 x 32 x 32", (1, 16384, 16, 64), lambda: Layout.neighborhood((16, 32, 32), 7), (1.3, 1.25)),
    Speed("dense causal", (2, 8192, 16, 128), lambda: Layout.causal(8192), (None, None)),
]
RASTER = "13 x 13 on 128 x 128", "7 x 7 x 7 on 16 x 32 x 32"  # also with tiles of neighbouring indices, as long as the boxes' are


class Check(NamedTuple):
    """A layout whose results are compared with the definition: on `tokens` queries, with further inputs made by `more`."""

    layout: Callable[[torch.device], Layout]
    more: Callable[[torch.device], dict[str, Any]] = lambda device: {}
    heads: tuple[int, int, int] = (2, 1, 1)


def _cu(device: torch.device) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([0, 130, 130, 131, 333], device=device)}


def _factors(device: torch.device) -> dict[str, Any]:
    return {"bias": tuple(torch.linspace(-1, 1, 333 * 8, device=device).view(1, 333, 2, 4) * scale for scale in (1, 2))}


def _mask(*shape: int, share: float, device: torch.device) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(device) < share


CHECKS: dict[str, Check] = {
    "causal": Check(lambda d: Layout.causal(333)),
    "dense": Check(lambda d: Layout.dense(333, 400)),
    "window and sinks": Check(lambda d: Layout.window(333, 100, 5)),
    "longer keys": Check(lambda d: Layout.window(100, 90, 5, m=333)),
    "terrace": Check(lambda d: Layout.terrace(333, 48)),
    "band, global tokens": Check(lambda d: Layout.band(333, 40, 30, global_tokens=9)),
    "strided": Check(lambda d: Layout.strided(333, 3, window=2, block=32)),
    "power": Check(lambda d: Layout.power(333, window=2, block=32)),
    "plane": Check(lambda d: Layout.neighborhood((17, 19), (7, 6))),
    "plane, stride and dilation": Check(lambda d: Layout.neighborhood((20, 18), (5, 6), stride=(2, 3), dilation=(3, 2))),
    "volume": Check(lambda d: Layout.neighborhood((5, 9, 8), (3, 5, 4), causal=(True, False, False))),
    "circle": Check(lambda d: Layout.circle((17, 19), 4.5)),
    "block lists": Check(lambda d: Layout.from_block_mask(_mask(2, 6, 6, share=0.5, device=d), 64, n=333, m=333), heads=(4, 2, 2)),
    "bitmaps": Check(lambda d: Layout.from_predicate(lambda i, j: (3 * i + 5 * j) % 7 < 3, 333, 333, 64, device=d)),
    "packed": Check(lambda d: Layout.window(333, 100, 5), _cu),
    "slopes": Check(lambda d: Layout.window(333, 100, 5), lambda d: {"bias": torch.tensor([0.02, 0.3], device=d)}),
    "bias of keys": Check(lambda d: Layout.causal(333), lambda d: {"key_bias": torch.linspace(-3, 1, 333, device=d).view(1, 1, 333)}),
    "factors": Check(lambda d: Layout.causal(333), _factors),
    "softcap": Check(lambda d: Layout.causal(333), lambda d: {"softcap": 2.0}),
    "grouped heads": Check(lambda d: Layout.window(333, 100), heads=(6, 2, 2)),
}  # fmt: skip


def results(attend: Callable[..., Any], x: list[Tensor], layout: Layout, more: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """o, lse and every gradient, of inputs in `dtype`; both outputs have gradients."""

    def leaf(t: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(leaf(part) for part in t)
        keep = not isinstance(t, Tensor) or not t.is_floating_point()
        return t if keep else t.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()

    qkv = [t.detach().to(dtype).requires_grad_() for t in x]
    given = {name: leaf(value) for name, value in more.items()}
    how = {} if attend is sparse_attention_reference else {"return_lse": True}
    o, lse, *_ = attend(*qkv, layout, **given, **how)
    lse = lse.masked_fill(lse.isinf(), 0)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t) for i, t in enumerate((o, lse))]
    flat = [t for value in given.values() for t in (value if isinstance(value, tuple) else (value,))]
    leaves = [*qkv, *(t for t in flat if isinstance(t, Tensor) and t.requires_grad)]
    grads = torch.autograd.grad((o.to(lse.dtype) * weights[0].to(lse.dtype)).sum() + (lse * weights[1]).sum(), leaves)
    names = ["dq", "dk", "dv", *(f"d{i}" for i in range(len(leaves) - 3))]
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(names, (g.detach() for g in grads)))}


def ours(x: dict[str, Tensor], layout: Layout) -> Tensor:
    found: Tensor = sparse_attention(x["q"], x["k"], x["v"], layout)
    return found


def sdpa(x: dict[str, Tensor], backend: Any) -> Tensor:
    """torch's own dense causal attention."""
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in "qkv"), is_causal=True).transpose(1, 2)


FLEX = [{}, {"BLOCK_M": 128, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_N": 64}]  # kernel options that are tried


def flex(layout: Layout, device: torch.device, block: int, options: dict[str, Any]) -> Callable[[dict[str, Tensor]], Tensor]:
    """FlexAttention of a layout, compiled, its mask made here, outside of what is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shift, rule = layout.m - layout.n, layout.inner
    mask = create_block_mask(
        lambda b, h, i, j: rule.allowed(i + shift, j), None, None, layout.n, layout.m, device=str(device), BLOCK_SIZE=block
    )
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def run(x: dict[str, Tensor]) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        found: Tensor = attend(q, k, v, block_mask=mask, kernel_options=options or None)
        return found.transpose(1, 2)

    return run
