"""The dilated window: who sees whom, dilations by head, and what is kept."""

import pytest
import torch

import subquad
from subquad import InputError, State
from subquad.ops.sparse import Layout


def inputs(n, heads=4, kv_heads=4, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, h, 8, dtype=torch.float64, generator=generator) for h in (heads, kv_heads, kv_heads)]


def weights(n, heads, **options):
    """``[heads, N, N]``: values are unit vectors."""
    module = subquad.attention("dilated-window", heads, 8, value_dim=n, **options)
    q, k, _ = inputs(n, heads, heads)
    return module(q, k, torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, heads, n))[0].transpose(0, 1)


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_keys_are_those_of_the_definition(d):
    seen = weights(50, 1, window=4, dilation=d)[0] > 0
    for i in range(50):
        assert set(seen[i].nonzero().flatten().tolist()) == {i - d * t for t in range(4) if i - d * t >= 0}
    assert torch.equal(seen, Layout.neighborhood(50, 4, dilation=d, causal=True).to_mask())


def test_each_share_of_the_heads_has_its_own():
    seen = weights(40, 6, window=3, dilation=(1, 4, 9)) > 0
    for head, d in enumerate((1, 1, 4, 4, 9, 9)):
        assert torch.equal(seen[head], weights(40, 1, window=3, dilation=d)[0] > 0)


def test_without_dilation_it_is_the_sliding_window():
    q, k, v = inputs(70, 4, 2)
    plain = subquad.attention("sliding-window", 4, 8, kv_heads=2, window=9, sinks=0)
    torch.testing.assert_close(subquad.attention("dilated-window", 4, 8, kv_heads=2, window=9, dilation=1)(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("pieces", [[1] * 60, [17, 1, 30, 2, 10], [1, 59]], ids=["ones", "odd", "rest"])
def test_dilations_by_head_in_any_split(pieces):
    module = subquad.attention("dilated-window", 4, 8, kv_heads=2, window=3, dilation=(2, 5))
    x = inputs(60, 4, 2, batch=2)
    state, outputs = None, []
    for part in zip(*(t.split(pieces, 1) for t in x)):
        o, state = module(*part, state=state, return_state=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), module(*x))
    torch.testing.assert_close(torch.cat(outputs, 1), subquad.reference("dilated-window")(module, *x))
    assert {name: tuple(t.shape) for name, t in state.tensors.items()} == {
        "k0": (2, 6, 1, 8), "v0": (2, 6, 1, 8), "k1": (2, 15, 1, 8), "v1": (2, 15, 1, 8)
    }  # fmt: skip
    shape = subquad.Shape(60, 4, 8, kv_heads=2, batch=2, itemsize=8)
    assert state.nbytes == module.card.state_bytes(shape, **module.options)


def test_rows_of_other_residues_go_on_together():
    """Lengths 3, 8 and 50 differ mod 2 and mod 5: every row keeps to its own residues."""
    module = subquad.attention("dilated-window", 4, 8, kv_heads=2, window=3, dilation=(2, 5))
    rows = [inputs(n + 6, 4, 2, seed=n) for n in (3, 8, 50)]
    states = [module(*(t[:, :-6] for t in row), return_state=True)[1] for row in rows]
    o = module(*(torch.cat([row[i][:, -6:] for row in rows]) for i in range(3)), state=State.join(states))
    for got, row in zip(o, rows):
        torch.testing.assert_close(got, module(*row)[0, -6:])


def test_it_costs_a_plain_window():
    plain = subquad.card("sliding-window").flops(subquad.Shape(65536, 8, 64), window=256, sinks=0)
    assert subquad.card("dilated-window").flops(subquad.Shape(65536, 8, 64), window=256, dilation=(1, 4)) == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("wrong", [0, (1, 0), (), "2", 1.5, (1, 2, 3)])
def test_wrong_dilations(wrong):
    with pytest.raises(InputError, match="dilation"):
        subquad.attention("dilated-window", 4, 8, dilation=wrong)
