"""The short causal convolution against torch's own with padding on the left; kept tokens, packing and repeated heads."""

import pytest
import torch
from torch.nn.functional import conv1d, pad

from subquad.ops.short_conv import short_conv


def by_torch(x, weight):
    """x ``[B, N, H, D]`` by depthwise conv1d on the flattened channels."""
    channels = x.flatten(2).transpose(1, 2)
    taps = weight.flatten(0, 1)[:, None]
    return conv1d(pad(channels, (taps.shape[-1] - 1, 0)), taps, groups=taps.shape[0]).transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_it_is_conv1d_with_padding_on_the_left(n, size):
    x, weight = torch.randn(2, n, 3, 5, dtype=torch.float64), torch.randn(3, 5, size, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y, expected = short_conv(x, weight)[0], by_torch(x, weight)
    torch.testing.assert_close(y, expected)
    for got, want in zip(*(torch.autograd.grad(o, (x, weight), torch.ones_like(o)) for o in (y, expected))):
        torch.testing.assert_close(got, want)


def test_heads_are_repeated():
    x, weight = torch.randn(2, 9, 2, 5, dtype=torch.float64), torch.randn(6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(short_conv(x, weight)[0], by_torch(x.repeat_interleave(3, 2), weight))


@pytest.mark.parametrize("size", [1, 4])
def test_pieces_and_packed_sequences(size):
    x, weight = torch.randn(1, 40, 2, 3, dtype=torch.float64), torch.randn(2, 3, size, dtype=torch.float64)
    whole, last = short_conv(x, weight)
    assert torch.equal(last, x[:, 41 - size :])
    kept, outputs = None, []
    for a, b in ((0, 1), (1, 3), (3, 3), (3, 30), (30, 40)):
        y, kept = short_conv(x[:, a:b], weight, kept=kept)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert torch.equal(kept, last)
    cu = torch.tensor([0, 2, 2, 17, 40])
    packed, tails = short_conv(x, weight, cu_seqlens=cu)
    alone = [by_torch(x[:, a:b], weight) for a, b in ((0, 2), (2, 17), (17, 40))]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    again, _ = short_conv(x, weight, kept=tails, cu_seqlens=cu)
    first = torch.cat([x[:, :2], x[:, :2]], 1)
    torch.testing.assert_close(again[:, :2], by_torch(first, weight)[:, 2:])
