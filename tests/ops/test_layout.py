"""Layout: masks by hand, densities, and what bad arguments get."""

import pytest
import torch

from subquad import InputError
from subquad.ops.sparse import Layout
from subquad.ops.sparse.layout import segments
from subquad.ops.sparse.rules import EVERYTHING, Causal, Terrace, Window


def draw(layout):
    return ["".join("#" if x else "." for x in row) for row in layout.to_mask().tolist()]


def test_masks_by_hand():
    assert draw(Layout.dense(2, 3)) == ["###", "###"]
    assert draw(Layout.causal(3)) == ["#..", "##.", "###"]
    assert draw(Layout.causal(2, 4)) == ["###.", "####"]
    assert draw(Layout.window(5, 2)) == ["#....", "##...", ".##..", "..##.", "...##"]
    assert draw(Layout.window(5, 2, sinks=1)) == ["#....", "##...", "###..", "#.##.", "#..##"]
    assert draw(Layout.window(2, 2, sinks=1, m=5)) == ["#.##.", "#..##"]
    assert draw(Layout.window(3, 1, sinks=9)) == ["#..", "##.", "###"]
    assert draw(Layout.terrace(6, 2)) == ["#.....", "##....", "###...", "####..", "..###.", "..####"]


def test_block_masks_by_hand():
    mask = torch.tensor([[True, False], [False, True]])
    assert draw(Layout.from_block_mask(mask, 2)) == ["##..", "##..", "..##", "..##"]
    assert draw(Layout.from_block_mask(mask, 2, n=3, m=3)) == ["##.", "##.", "..#"]
    assert draw(Layout.from_block_mask(mask, (1, 2))) == ["##..", "..##"]
    assert draw(Layout.from_block_mask(mask, 2, rule=Causal())) == ["#...", "##..", "..#.", "..##"]


@pytest.mark.parametrize("lead", [(), (3,), (1, 3), (2, 1), (2, 3), (1, 1)])
def test_block_mask_round_trip(lead):
    mask = torch.rand(*lead, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.6
    layout = Layout.from_block_mask(mask, (3, 2), n=14, m=7)
    want = mask.repeat_interleave(3, -2).repeat_interleave(2, -1)[..., :14, :7]
    got = layout.to_mask()
    assert torch.equal(got, want.reshape(got.shape))
    assert got.dim() == (4 if lead[:1] == (2,) else 3 if lead[-1:] == (3,) else 2)
    assert layout.index.dtype == torch.int32 and layout.counts.dtype == torch.int32
    assert layout.index.shape[-1] == mask.sum(-1).max(), "no more capacity than the longest list"
    assert layout.density == pytest.approx(want.double().mean().item())


@pytest.mark.parametrize(
    "layout",
    [
        Layout.dense(70, 90), Layout.causal(300), Layout.causal(7, 300), Layout.window(300, 17, 3), Layout.window(130, 500),
        Layout.window(150, 20, 40, m=222), Layout.terrace(333, 32),
        Layout.from_block_mask(torch.ones(40, 2, dtype=torch.bool), (8, 200), rule=Window(50, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_density_is_the_share_of_the_mask(layout):
    assert layout.density == pytest.approx(layout.to_mask().double().mean().item(), rel=1e-12)
    assert f"{100 * layout.density:.2f} %" in repr(layout)


def test_static_layouts_hold_nothing():
    for layout in (Layout.dense(10**9, 10**9), Layout.causal(10**9), Layout.window(10**9, 512, 4)):
        assert not any(isinstance(x, torch.Tensor) for x in vars(layout).values())


@pytest.mark.parametrize("rule", [EVERYTHING, Causal(), Window(1), Window(7), Window(7, 3), Window(3, 12), Terrace(4), Terrace(1)], ids=str)
def test_ranges_agree_with_pairs(rule):
    """touches, covers and the segments between cuts, against every pair."""
    size = 24
    pairs = rule.allowed(torch.arange(size)[:, None], torch.arange(size))
    for q0 in range(size):
        for q1 in range(q0, size):
            rows = pairs[q0 : q1 + 1]
            seen = torch.zeros(size, dtype=torch.bool)
            for a, b, full in segments(rule, q0, q1, size):
                assert rows[:, a:b].any() and full == bool(rows[:, a:b].all())
                seen[a:b] = True
            assert torch.equal(seen | rows.any(0), seen), "a key that is seen lies outside every segment"
            for k0, k1 in ((0, 3), (2, 9), (q0, q1), (11, 11), (5, 23)):
                piece = rows[:, k0 : k1 + 1]
                assert rule.touches(q0, q1, k0, k1) or not piece.any()
                assert not rule.covers(q0, q1, k0, k1) or piece.all()


def test_pieces_of_one_pattern_look_alike():
    for rule in (Causal(), Window(5), Window(5, 3), Window(2, 9), Terrace(4)):
        found = {}
        for first in range(20):
            for a, b in [(a, b) for a, b, full in segments(rule, first, first + 3, 24) if not full]:
                piece = rule.allowed(torch.arange(first, first + 4)[:, None], torch.arange(a, b))
                assert torch.equal(piece, found.setdefault((b - a, rule.pattern(first, a, b - 1)), piece))


def test_positions_and_sequences():
    layout = Layout.window(4, 2)
    assert torch.equal(
        layout.to_mask(cu_seqlens=torch.tensor([0, 1, 1, 4])).int(), torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    )
    at = layout.to_mask(q_pos=torch.tensor([5, 5, 9, 9]), k_pos=torch.tensor([5, -1, 4, 8]))
    assert torch.equal(at.int(), torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]))


@pytest.mark.parametrize(
    "argument,make",
    [
        ("n", lambda: Layout.dense(-1, 4)),
        ("n", lambda: Layout.causal(4.0)),
        ("m", lambda: Layout.causal(5, 4)),
        ("size", lambda: Layout.window(5, 0)),
        ("sinks", lambda: Layout.window(5, 2, sinks=-1)),
        ("m", lambda: Layout.window(5, 2, m=4)),
        ("mask", lambda: Layout.from_block_mask(torch.ones(2, 2), 4)),
        ("mask", lambda: Layout.from_block_mask(torch.ones(2, dtype=torch.bool), 4)),
        ("block", lambda: Layout.from_block_mask(torch.ones(2, 2, dtype=torch.bool), 0)),
        ("n", lambda: Layout.from_block_mask(torch.ones(2, 2, dtype=torch.bool), 4, n=9)),
        ("m", lambda: Layout.from_block_mask(torch.ones(2, 2, dtype=torch.bool), 4, m=4)),
    ],
)
def test_bad_arguments_are_named(argument, make):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.argument == argument and "\n" not in str(error.value)
