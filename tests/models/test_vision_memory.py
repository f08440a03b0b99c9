"""What RAVLT's blocks keep for the backward pass, and that computing the rest again changes neither values nor gradients."""

import pytest
import torch
import torch.nn.functional as F

from subquad.layers.rotary2d import rala_rotary
from subquad.models.vision.blocks import Block, FeedForward, GeluConv

DIM, WIDTH, ROWS, COLUMNS = 8, 28, 6, 10
TOKENS = ROWS * COLUMNS


def kept(module, batch, *more):
    """Bytes of the storages that autograd keeps of a call on `batch` images of tokens."""
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = module(torch.randn(batch, ROWS, COLUMNS, DIM, requires_grad=True), *more)
    assert y.requires_grad  # alive until here, so that no storage takes the place of another
    return sum(found.values())


def kept_of_an_image(module, *more):
    """Without weights, and casts of them, of which there are as many for any batch."""
    return kept(module, 3, *more) - kept(module, 2, *more)


def convolved(conv, a):
    return F.conv2d(a.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=a.shape[-1]).movedim(1, -1)


@pytest.mark.parametrize("size, autocast", [(4, False), (2, True)])
def test_feed_forward_keeps_what_its_products_read_and_the_input_of_gelu(size, autocast):
    """x for x W, h = x W for GELU and its convolution, and what W′ takes; no further copy as wide as h."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert kept_of_an_image(FeedForward(DIM, WIDTH)) <= TOKENS * (DIM + 2 * WIDTH) * size


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_block_keeps_a_branch_once_whether_it_may_be_dropped_or_not(rate):
    """Widths of a block with softmax: x, two norms' inputs and the products' inputs; q, k, v and the gate; q and k turned, o, o + DW(v);
    the branches, which γ multiplies; h and what W′ takes. Beside them, norms' and softmax's statistics, and how branches are scaled."""
    block, rotary = Block(DIM, 1, "softmax", WIDTH / DIM, 1.0, rate), rala_rotary((ROWS, COLUMNS), DIM)
    widths = DIM * (1 + 2 + 3 + 4 + 4 + 2) + 2 * WIDTH
    assert kept_of_an_image(block, rotary) <= 4 * (TOKENS * (widths + 2 * 2 + 1) + 2 * (DIM + 1))


def test_gelu_conv_has_the_gradients_of_finite_differences():
    conv = GeluConv(3, 3).double()
    h = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def apply(h, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (h,))

    given = (h, conv.weight, conv.bias)
    assert torch.autograd.gradcheck(apply, given) and torch.autograd.gradgradcheck(apply, given)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias"), ("h",), ("h", "bias")])
def test_gelu_conv_is_its_definition_whatever_is_frozen(frozen):
    conv = GeluConv(5, 3).double()
    given = {"h": torch.randn(2, 4, 7, 5, dtype=torch.float64), "weight": conv.weight, "bias": conv.bias}
    for name, x in given.items():
        x.requires_grad_(name not in frozen)
    a = F.gelu(given["h"])
    expected, y = a + convolved(conv, a), conv(given["h"])
    torch.testing.assert_close(y, expected)
    learned, weights = [x for name, x in given.items() if name not in frozen], torch.randn_like(y)
    for found, of in zip(*(torch.autograd.grad((z * weights).sum(), learned) for z in (y, expected))):
        torch.testing.assert_close(found, of)


def test_gelu_conv_under_the_transforms_of_torch_func():
    conv, h = GeluConv(5, 3).double(), torch.randn(3, 2, 4, 4, 5, dtype=torch.float64)

    def plain(h):
        a = F.gelu(h)
        return (a + convolved(conv, a)).square().sum()

    found = torch.func.vmap(torch.func.grad(lambda h: conv(h).square().sum()))(h)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(plain)(x) for x in h]))


@pytest.mark.parametrize("mechanism", ["rala", "softmax"])
def test_a_block_in_training_is_its_definition(mechanism):
    """Each image's branch is dropped, or divided by the rate of those that are kept, and added, in the order of the branches."""
    rate, batch = 0.4, 16
    block, rotary = Block(DIM, 1, mechanism, 3.5, 1.0, rate).double(), rala_rotary((ROWS, COLUMNS), DIM)
    block.gamma1.data, block.gamma2.data = torch.randn(2, DIM, dtype=torch.float64)
    x = torch.randn(batch, ROWS, COLUMNS, DIM, dtype=torch.float64)
    torch.manual_seed(3)
    y = block(x, rotary)
    torch.manual_seed(3)
    first, second = (torch.empty(batch, 1, 1, 1, dtype=torch.float64).bernoulli_(1 - rate) for _ in range(2))
    assert 0 < first.sum() < batch and 0 < second.sum() < batch
    z = x + convolved(block.position, x)
    z = z + first * (block.gamma1 * block.attn(block.norm1(z), rotary)) / (1 - rate)
    a = F.gelu(block.ffn.fc1(block.norm2(z)))
    expected = z + second * (block.gamma2 * block.ffn.fc2(a + convolved(block.ffn.conv, a))) / (1 - rate)
    torch.testing.assert_close(y, expected)
    parameters, weights = list(block.parameters()), torch.randn_like(y)
    for found, of in zip(*(torch.autograd.grad((z * weights).sum(), parameters) for z in (y, expected))):
        torch.testing.assert_close(found, of)


def test_autocast_gives_the_values_and_gradients_of_gelu_and_convolution_as_they_are():
    conv, h = GeluConv(WIDTH, 3), torch.randn(2, ROWS, COLUMNS, WIDTH).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(h)
        a = F.gelu(h)
        expected = a + convolved(conv, a)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    given = (h, conv.weight, conv.bias)
    for found, of, dtype in zip(*(torch.autograd.grad(z.float().sum(), given) for z in (y, expected)), [x.dtype for x in given]):
        assert found.dtype == dtype
        torch.testing.assert_close(found, of)


def test_compiled_feed_forward_has_the_same_gradients():
    ffn, x = FeedForward(DIM, WIDTH), torch.randn(2, ROWS, COLUMNS, DIM, requires_grad=True)
    runs, given = (ffn, torch.compile(ffn, backend="aot_eager", fullgraph=True)), [x, *ffn.parameters()]
    for found, of in zip(*(torch.autograd.grad(run(x).square().sum(), given) for run in runs)):
        torch.testing.assert_close(found, of)
