"""BigBird: the blocks that are seen, the draws among them, and the attention of transformers over the same blocks."""

import pytest
import torch

import subquad
from subquad import InputError, State

BOTH = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make(heads=2, **options):
    return subquad.attention("bigbird", heads, 8, **{"block": 4, "random_blocks": 2, **options})


def drawn(module, count):
    """The random blocks ``[heads][query block]``, as sets; no block is named twice."""
    found = [[[x for x in row if x >= 0] for row in head] for head in module.random(torch.arange(count)[None], count)[0].tolist()]
    assert all(len(row) == len(set(row)) for head in found for row in head)
    return [[set(row) for row in head] for head in found]


def seen_by(module, n):
    """The key tokens with a weight, ``[heads, N, N]``: values are unit vectors."""
    options = {**module.options, "heads": module.heads}
    wide = subquad.attention("bigbird", options.pop("heads"), 8, value_dim=n, **options)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, module.heads, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    return wide(q, k, torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, module.heads, n))[0].transpose(0, 1) > 0


@pytest.mark.parametrize("n", [3, 8, 13, 49, 64])
@pytest.mark.parametrize("local, global_blocks, random_blocks", [(2, 1, 2), (1, 0, 3), (3, 2, 0), (1, 2, 1), (1, 0, 0)])
@BOTH
def test_who_sees_whom(causal, local, global_blocks, random_blocks, n):
    """Block by block from the words of the definition; random blocks are as many as there may be, and others than the rest."""
    module = make(causal=causal, local=local, global_blocks=global_blocks, random_blocks=random_blocks)
    count = -(-n // 4)
    last = 0 if causal else global_blocks
    for head, (rows, seen) in enumerate(zip(drawn(module, count), seen_by(module, n))):
        for i in range(count):
            known = {j for j in range(count) if abs(i - j) < local or j < global_blocks or j >= count - last}
            if i < last or i >= count - last:
                blocks = set(range(count))
            else:
                others = {j for j in range(i if causal else count) if j not in known}
                assert rows[i] <= others and len(rows[i]) == min(random_blocks, len(others)), (head, i)
                blocks = known | rows[i]
            for token in range(4 * i, min(4 * i + 4, n)):
                expected = {j for j in range(n) if j // 4 in blocks and (j <= token or not causal)}
                assert set(seen[token].nonzero().flatten().tolist()) == expected, (head, token)


def hashed(x):
    x = (x + 0x9E3779B9) % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15


@BOTH
def test_draws_are_a_hash_of_whole_numbers(causal):
    """Floyd's subsets in Python's integers: the same on every device and with every number of threads."""
    module = make(3, causal=causal, random_blocks=3, seed=2**32 - 5, layer=(4, 6))
    for count in (9, 30):
        rows = drawn(module, count)
        for head in range(3):
            for i in range(1, count if causal else count - 1):
                others = [j for j in range(i if causal else count - 1) if j >= 1 and abs(i - j) >= 2]
                key = hashed(hashed(hashed(hashed(2**32 - 5) + 4) + head) + i)
                picked = set()
                for t in range(3) if len(others) > 3 else ():
                    last = len(others) - 3 + t
                    pick = hashed(key + t) % (last + 1)
                    picked.add(last if pick in picked else pick)
                assert rows[head][i] == ({others[x] for x in picked} if len(others) > 3 else set(others))


def test_draws_differ_and_are_even():
    one = drawn(make(4, causal=False), 200)
    assert one == drawn(make(4, causal=False), 200)
    assert one != drawn(make(4, causal=False, seed=1), 200) and one != drawn(make(4, causal=False, layer=(1, 2)), 200)
    assert sum(one[0][i] == one[1][i] for i in range(200)) < 10, "heads draw apart"
    hits = torch.zeros(200)
    for head in drawn(make(64, causal=False), 200):
        for i in range(1, 199):
            hits[list(head[i])] += 1
    inner = hits[1:-1]  # 64 · 198 · 2 draws of 198 blocks, 128 each: even ones have a standard deviation of about √128
    assert inner.sum() == 64 * 198 * 2 and hits[0] == hits[-1] == 0
    assert 0.8 * 128**0.5 < inner.std() < 1.2 * 128**0.5 and (inner - 128).abs().max() < 5 * 128**0.5


def test_causal_draws_do_not_depend_on_the_length():
    module = make(random_blocks=3)
    assert [head[:20] for head in drawn(module, 50)] == drawn(module, 20)


def test_it_is_the_attention_of_transformers():
    """`BigBirdBlockSparseAttention`, which leaves blocks out at the ends, given our draws."""
    modeling = pytest.importorskip(
        "transformers.models.big_bird.modeling_big_bird", reason="this version of transformers has no such model to compare with"
    )
    torch.manual_seed(0)
    config = modeling.BigBirdConfig(hidden_size=32, num_attention_heads=4, block_size=4, num_random_blocks=2, attention_type="block_sparse")
    theirs = modeling.BigBirdBlockSparseAttention(config).double().eval()
    ours, count = make(4, causal=False), 13
    theirs._bigbird_block_rand_mask_with_head = lambda **_: list(ours.random(torch.arange(1, count - 1)[None], count)[0].numpy())
    hidden, mask = torch.randn(2, count * 4, 32, dtype=torch.float64), torch.ones(2, count * 4, dtype=torch.float64)
    blocked, band, of_q, of_k = modeling.BigBirdModel.create_masks_for_block_sparse_attn(mask, 4)
    expected = theirs(hidden, band, of_q, of_k, blocked, blocked)[0]
    q, k, v = (layer(hidden).unflatten(2, (4, 8)) for layer in (theirs.query, theirs.key, theirs.value))
    torch.testing.assert_close(ours(q, k, v).flatten(2), expected)


def test_lists_hold_no_more_than_they_should():
    """16 times the tokens, 16 times the pairs: of each of 7 blocks but the ends' two, which are dense."""
    module = make(1, causal=False, block=16, local=2, global_blocks=1, random_blocks=2)
    layout = module.layout(16 * 256)
    assert layout.index.shape == (1, 1, 254, 7) and (layout.counts <= 7).all()
    assert layout.to_mask().sum() == sum(len(x | {0, 255, *range(max(1, i - 1), min(255, i + 2))}) * 256 for i, x in
                                         enumerate(drawn(module, 256)[0]) if 0 < i < 255)  # fmt: skip


@pytest.mark.parametrize("pieces", [[1, 3, 4, 40], [2, 46], [3, 1, 17, 1, 26]], ids=str)
def test_rows_of_different_length_go_on(pieces):
    """Single tokens, fewer than a block and many, behind rows that end at other places of their blocks."""
    module = make(4, kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(1, n + 48, h, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2)] for n in (3, 16, 50)]
    state = State.join([module(*(t[:, :-48] for t in row), return_state=True)[1] for row in rows])
    outputs = []
    for part in zip(*(torch.cat([row[i][:, -48:] for row in rows]).split(pieces, 1) for i in range(3))):
        o, state = module(*part, state=state, return_state=True)
        outputs.append(o)
    for got, row in zip(torch.cat(outputs, 1), rows):
        torch.testing.assert_close(got, module(*row)[0, -48:])


@pytest.mark.parametrize(
    "option, wrong", [("block", 0), ("local", 0), ("global_blocks", -1), ("random_blocks", -1), ("seed", -1), ("seed", 2**32)]
)
def test_wrong_options(option, wrong):
    with pytest.raises(InputError, match=option):
        make(**{option: wrong})
