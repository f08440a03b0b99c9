"""One decoded token of LoLCATs by its kernel, against the definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import subquad
from subquad import InputError, Rotary
from subquad.mechanisms.hybrid import lolcats
from subquad.ops.window_step import first, first_kept, fused, serves, window_step
from subquad.state import State

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 14


@pytest.fixture
def tokens(monkeypatch):
    """A one for each token that the kernel makes."""
    found, forward = [], fused.forward
    monkeypatch.setattr(fused, "forward", lambda *given: (found.append(1), forward(*given))[1])
    return found


@pytest.fixture
def firsts(monkeypatch):
    """A one for each first call by its kernels."""
    found, call = [], first.first_call
    monkeypatch.setattr(first, "first_call", lambda *given: (found.append(1), call(*given))[1])
    return found


def make(heads=(4, 2), width=16, **options):
    module = subquad.attention("lolcats", heads[0], width, kv_heads=heads[1], **{"window": 5, "feature_dim": 16, **options}).to(DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return module


def inputs(module, n=N, batch=2, dtype=torch.float32):
    sizes = (module.heads, module.head_dim), (module.kv_heads, module.head_dim), (module.kv_heads, module.value_dim)
    return [torch.randn(batch, n, *size, device=DEVICE).to(dtype) for size in sizes]


def angles(positions, width=16):
    return Rotary.of(positions.to(DEVICE), width, theta=100.0)


def defined(module, x, rotary):
    """The mechanism's definition, of these numbers, in float64."""
    return lolcats.reference(copy.deepcopy(module).double(), *(y.double() for y in x), rotary=rotary)


@torch.no_grad()
def one_by_one(module, x, rotary, state, start=0):
    outputs = []
    for t in range(start, x[0].shape[1]):
        now = {"rotary": rotary.narrow(t, t + 1), "state": state, "return_state": True}
        o, state = module(*(y[:, t : t + 1] for y in x), **now)
        outputs.append(o)
    return torch.cat(outputs, 1), state


@torch.no_grad()
def started(module, x, rotary, n):
    return module(*(y[:, :n] for y in x), rotary=rotary.narrow(0, n), return_state=True)[1]


def compare(module, tokens, n=N, start=0, share=2e-6, **given):
    """Tokens from `start` on, and the state after them, which is that of the step in plain torch."""
    x, rotary = inputs(module, n, **given), angles(torch.arange(n), module.head_dim)
    state = started(module, x, rotary, start)
    found, last = one_by_one(module, x, rotary, state, start)
    assert len(tokens) == n - start and found.dtype == x[0].dtype
    wanted = defined(module, x, rotary)[:, start:]
    assert (found.double() - wanted).abs().max() <= share * wanted.abs().max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBQUAD_KERNELS", "off")
        _, plain = one_by_one(module, x, rotary, state, start)
    assert len(tokens) == n - start
    assert torch.equal(last["v"], plain["v"]) and torch.equal(last.length, plain.length)
    # a device may fuse products and sums in what turns keys
    torch.testing.assert_close(last["k"], plain["k"], rtol=max(1e-6, torch.finfo(last["k"].dtype).eps), atol=1e-6)
    assert last["S"].dtype == torch.float32 and last["S"].shape == plain["S"].shape
    return last["S"], plain["S"]


def same_sums(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


# ---- its definition --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine_factors", [False, True])
@pytest.mark.parametrize("far_rotary", [True, False])
@pytest.mark.parametrize("sinks, window", [(0, 1), (0, 5), (4, 1), (4, 5), (1, 7)])
def test_from_nothing_through_more_than_is_kept(sinks, window, far_rotary, affine_factors, tokens):
    module = make(sinks=sinks, window=window, far_rotary=far_rotary, affine_factors=affine_factors)
    same_sums(*compare(module, tokens, n=sinks + window + 5, batch=1))


@pytest.mark.parametrize("sinks, far_rotary", [(0, True), (4, False)])
@pytest.mark.parametrize("start", [60, 64, 80])
def test_behind_many_tokens_at_once(start, sinks, far_rotary, tokens):
    same_sums(*compare(make(sinks=sinks, window=64, far_rotary=far_rotary), tokens, n=start + 7, start=start, batch=1))


@pytest.mark.parametrize("sizes", [(16, 16, 16), (48, 20, 24), (8, 33, 48), (64, 16, 5)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (3, 1)], ids=str)
def test_sizes(heads, sizes, tokens):
    width, features, columns = sizes
    module = make(heads, width, feature_dim=features, value_dim=columns, sinks=2, far_rotary=False)
    same_sums(*compare(module, tokens, n=9, start=2, batch=1))


@pytest.mark.parametrize("far_rotary", [True, False])
def test_more_than_a_program_holds(far_rotary, tokens, monkeypatch):
    """Tiles of values and sums, pieces of what is kept, and pieces of maps."""
    monkeypatch.setattr(fused, "ELEMENTS", 256)
    module = make((4, 2), 40, feature_dim=16, value_dim=40, window=31, sinks=4, far_rotary=far_rotary)
    same_sums(*compare(module, tokens, n=40, start=33, batch=1))


def test_wide_heads(tokens):
    same_sums(*compare(make((2, 1), 160, feature_dim=130, value_dim=200, sinks=1), tokens, n=8, start=5, batch=1))


@pytest.mark.parametrize("far_rotary", [True, False])
@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_sixteen_bits(dtype, share, far_rotary, tokens):
    """Features of bfloat16 are rounded to it, as before the sums in a pass over many tokens, but for a few that lie between two."""
    module = make(sinks=2, far_rotary=far_rotary)
    found, wanted = compare(module, tokens, n=16, batch=1, share=share, dtype=dtype)
    if dtype == torch.float16:
        return same_sums(found, wanted)
    apart = (found - wanted).abs()
    assert apart.max() <= 2**-7 * wanted.abs().max() and (apart > 1e-5).double().mean() < 0.02


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_maps_of_another_precision(weights, tokens):
    module = make((2, 1), sinks=2).to(weights)
    x, rotary = inputs(module, dtype=torch.bfloat16), angles(torch.arange(N))
    found, _ = one_by_one(module, x, rotary, started(module, x, rotary, 0))
    wanted = defined(module, x, rotary)
    assert len(tokens) == N and (found.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


# ---- rows, states and views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks, far_rotary", [(0, True), (3, False)])
def test_rows_of_different_length(sinks, far_rotary, tokens):
    """Behind packed sequences, which end before a sink, in the sinks, in the window and beyond it."""
    module, lengths, more = make(sinks=sinks, far_rotary=far_rotary), (0, 1, sinks + 2, sinks + 5, 21), 9
    x = inputs(module, 21 + more, batch=5)
    packed = [torch.cat([y[i : i + 1, :n] for i, n in enumerate(lengths)], 1) for y in x]
    places = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    with torch.no_grad():
        _, state = module(*packed, rotary=angles(places), cu_seqlens=ends, return_state=True)
    later = [torch.stack([y[i, n : n + more] for i, n in enumerate(lengths)]) for y in x]
    rotary = angles(torch.tensor(lengths)[:, None] + torch.arange(more))
    found, last = one_by_one(module, later, rotary, state)
    assert len(tokens) == more and last.length.tolist() == [n + more for n in lengths]
    wanted = defined(module, x, angles(torch.arange(21 + more)))
    for i, n in enumerate(lengths):
        assert (found[i] - wanted[i, n : n + more]).abs().max() <= 2e-6 * wanted.abs().max()


def given(module, length, dtype=torch.float32, batch=2):
    """Arguments of `window_step`: a state as after `length` tokens, full of numbers."""
    x = inputs(module, 1, batch, dtype)
    keys = module.head_dim * (1 if module.far_rotary else 2)
    kept = [torch.randn(batch, module.held, module.kv_heads, size, device=DEVICE).to(dtype) for size in (keys, module.value_dim)]
    sums = torch.rand(batch, module.heads, 2 * module.feature_dim, module.value_dim + 1, device=DEVICE)
    return x, kept, sums, torch.full((batch,), length, device=DEVICE)


@torch.no_grad()
def call(module, x, kept, sums, length, plain=None):
    return window_step(
        *x, tuple(kept), sums, length, (module.W_q, module.W_k), module.window_factor, sinks=module.sinks,
        affine=module.affine_factors, far=plain,
    )  # fmt: skip


@torch.no_grad()
def in_torch(module, x, kept, sums, length, plain=None):
    q, k, v = x
    if plain is not None:
        q, k = (torch.cat(pair, -1) for pair in zip((q, k), plain))
    o, state = lolcats.step(module, q, k, v, State({"S": sums, "k": kept[0], "v": kept[1]}, length))
    return o, (state["k"], state["v"]), state["S"]


def agree(found, wanted):
    (o, kept, sums), (o_wanted, kept_wanted, sums_wanted) = found, wanted
    torch.testing.assert_close(o, o_wanted, rtol=1e-5, atol=2e-6)
    same_sums(sums, sums_wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_wanted))


@pytest.mark.parametrize("length", [0, 2, 3, 7, 8, 9, 10_000_000_000])
def test_views_of_any_kind(length):
    """Queries in a joint tensor, kept heads before tokens, sums transposed, every other length; none of them is written."""
    module = make((6, 2), value_dim=16, sinks=3, far_rotary=False)
    x, kept, sums, at = given(module, length)
    plain = [torch.randn_like(y) for y in x[:2]]
    joint = torch.cat([torch.full_like(x[0], torch.nan), *x, *plain], 2).transpose(1, 2).contiguous().transpose(1, 2)
    _, q, k, v, *far = joint.split([6, 6, 2, 2, 6, 2], 2)
    strided = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in kept]
    turned = sums.mT.contiguous().mT
    every = torch.stack([at, at + 5], 1)[:, 0]
    assert not any(y.is_contiguous() for y in (q, k, v, *far, *strided, turned, every))
    before = [y.clone() for y in (q, k, v, *far, *strided, turned, every)]
    agree(call(module, (q, k, v), strided, turned, every, tuple(far)), in_torch(module, x, kept, sums, at, tuple(plain)))
    assert all(torch.equal(y, old) for y, old in zip((q, k, v, *far, *strided, turned, every), before))


def test_channels_apart_are_brought_together():
    module = make(sinks=1)
    x, kept, sums, at = given(module, 20)
    apart = [[y.mT.contiguous().mT for y in many] for many in (x, kept)]
    agree(call(module, *apart, sums, at), in_torch(module, x, kept, sums, at))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_places_without_a_token_are_not_read():
    """Whatever stands there changes neither output nor sums."""
    module = make(sinks=2, far_rotary=False)
    for length in (0, 1, 2, 4, 6, 8):
        x, kept, sums, at = given(module, length)
        plain = tuple(torch.randn_like(y) for y in x[:2])
        position = torch.tensor([*range(2), *range(length - 5, length)], device=DEVICE)
        free = (position < 0) | (position >= length)
        assert free.any() or length >= 5
        clean, odd = ([y.masked_fill(free[:, None, None], by) for y in kept] for by in (0.0, torch.nan))
        o, _, new = call(module, x, odd, sums, at, plain)
        wanted, _, new_wanted = call(module, x, clean, sums, at, plain)
        assert torch.equal(o, wanted) and torch.equal(new, new_wanted) and o.isfinite().all()


def test_the_past_weighs_by_its_sums():
    """With a window that weighs nothing, o is S's values by its weights, of the token that left as well."""
    module = make((1, 1), 2, feature_dim=2, window=1)
    with torch.no_grad():
        module.window_factor.fill_(-60.0)
        module.W_q.zero_()
        module.W_k.zero_()  # so that all four features are 1/2
    x, kept, sums, at = given(module, 9, batch=1)
    o, _, new = call(module, x, kept, sums, at)
    left = torch.cat([kept[1].flatten(), torch.ones(1, device=DEVICE)])
    torch.testing.assert_close(new[0, 0], sums[0, 0] + left / 2)
    torch.testing.assert_close(o.flatten(), new[0, 0].sum(0)[:2] / new[0, 0].sum(0)[2])


@pytest.mark.parametrize("size", [1e3, 3e4])
def test_large_logits_and_maps(size):
    module = make(sinks=2)
    x, kept, sums, at = given(module, 50)
    x, kept = [size * x[0], *x[1:]], [size * kept[0], kept[1]]
    found = call(module, x, kept, sums, at)
    if DEVICE.type == "cpu":  # a device adds up a score of a million in another order, and a softmax shows its last digits
        agree(found, in_torch(module, x, kept, sums, at))
    assert found[0].isfinite().all()
    assert (found[2] - sums)[..., -1].min() >= 0


def test_an_empty_batch():
    module = make(sinks=2)
    o, kept, sums = call(module, *given(module, 3, batch=0))
    assert o.shape == (0, 1, 4, 16) and kept[0].shape == (0, 7, 2, 16) and sums.shape == (0, 4, 32, 17)


# ---- where it serves -------------------------------------------------------------------------------------------------------------


def test_where_it_serves(tokens, monkeypatch):
    def made(count=1, like=torch.float32, **options):
        module = make(**options).to(torch.float64 if like == torch.float64 else torch.float32)
        x, rotary = inputs(module, 6 + count, dtype=like), angles(torch.arange(6 + count))
        state = started(module, x, rotary, 6)
        tokens.clear()
        now = [y[:, 6:] for y in x]
        return module, now, lambda: module(*now, rotary=rotary.narrow(6, 6 + count), state=state, return_state=True)

    for change, served in (({}, 1), ({"count": 2}, 0), ({"like": torch.float64}, 0), ({"window_form": "tk"}, 0)):
        module, _, step = made(**change)
        with torch.no_grad():
            step()
        assert len(tokens) == served
    module, _, step = made()
    assert all(y.requires_grad for y in step()[1].tensors.values() if y.dim() == 4 and y.shape[1] == 4)  # S, by the maps
    assert not tokens
    for p in module.parameters():
        p.requires_grad_(False)
    step()
    assert len(tokens) == 1
    _, now, step = made()
    now[1].requires_grad_()
    with torch.inference_mode():
        step()
    assert len(tokens) == 1
    monkeypatch.setenv("SUBQUAD_KERNELS", "off")
    with torch.no_grad():
        step()
    assert len(tokens) == 1


def test_angles_learn(tokens):
    module = make(sinks=2).requires_grad_(False)
    x, rotary = inputs(module, 8), angles(torch.arange(8))
    state = started(module, x, rotary, 7)
    tokens.clear()
    cos, exact = rotary.cos[7:].requires_grad_(), rotary.cos.double()[7:].requires_grad_()
    o, _ = module(*(y[:, 7:] for y in x), rotary=Rotary(cos, rotary.sin[7:]), state=state, return_state=True)
    whole = Rotary(torch.cat([rotary.cos[:7].double(), exact]), rotary.sin.double())
    (wanted,) = torch.autograd.grad(defined(module, x, whole)[:, 7].sum(), exact)
    (got,) = torch.autograd.grad(o.sum(), cos)
    assert not tokens and (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_inputs_that_it_does_not_take():
    module = make()
    (q, k, v), kept, sums, _ = given(module, 3)

    def served(q=q, k=k, v=v, kept=kept, sums=sums, maps=(module.W_q, module.W_k)):
        with torch.no_grad():
            return serves(q, k, v, tuple(kept), sums, maps, module.window_factor)

    assert served()
    assert not served(kept=[y.bfloat16() for y in kept]) and not served(k=k.half()) and not served(sums=sums.double())
    assert not served(maps=(module.W_q.double(), module.W_k)) and not served(q=q.repeat(1, 2, 1, 1))
    assert not served(v=torch.zeros(2, 1, 2, 257, device=DEVICE)) and not served(q=q.double())
    assert not torch.func.vmap(lambda y: y * served(q=y[None]))(q).any()


@pytest.mark.parametrize(
    "name, other", [("S", {"feature_dim": 8}), ("k", {"window": 4}), ("k", {"sinks": 1}), ("k", {"far_rotary": False})], ids=str
)
def test_states_of_other_sizes_are_refused(name, other, tokens):
    """Made by hand, so that they do not say whose they are."""
    (q, k, v), kept, sums, length = given(make(**other), 9)
    state = State({"S": sums, "k": kept[0], "v": kept[1]}, length)
    with torch.no_grad(), pytest.raises(InputError, match=rf"state\['{name}'\]"):
        make()(q, k, v, state=state)
    assert not tokens


def test_the_operator_is_well_formed():
    import subquad.ops.window_step.fused  # noqa: F401  registers it

    for far_rotary in (False, True):
        module = make((6, 2), value_dim=24, sinks=2, far_rotary=far_rotary)
        x, kept, sums, length = given(module, 11)
        far = [None, None] if far_rotary else [torch.randn_like(y) for y in x[:2]]
        weights = (module.W_q.detach(), module.W_k.detach(), module.window_factor.detach())
        args = (*x, *far, *kept, sums, length, *weights, module.sinks, True)
        torch.library.opcheck(torch.ops.subquad.window_step.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype):
    module = make(sinks=2, far_rotary=False)
    x, rotary = inputs(module, 12, dtype=dtype), angles(torch.arange(12))
    state, now = started(module, x, rotary, 11), [y[:, 11:] for y in x]

    def step(q, k, v):
        o, after = module(q, k, v, rotary=rotary.narrow(11, 12), state=state, return_state=True)
        return o, after["S"], after["k"], after["v"]

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
        for got, wanted in zip(compiled(*now), step(*now)):
            torch.testing.assert_close(got, wanted)


def test_is_exported():
    """Without gradients as one operator."""
    module = make(sinks=2)
    x, kept, sums, length = given(module, 11)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mechanism = module

        def forward(self, q, k, v, sums, keys, values, length):
            state = State({"S": sums, "k": keys, "v": values}, length)
            o, after = self.mechanism(q, k, v, state=state, return_state=True)
            return o, after["k"], after["v"], after["S"]

    with torch.no_grad():
        program = torch.export.export(Step(), (*x, sums, *kept, length))
        o, *after, new = program.module()(*x, sums, *kept, length)
    assert "window_step" in str(program.graph)
    agree((o, after, new), in_torch(module, x, kept, sums, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, sinks, window", [(1, 2, 5), (4, 2, 5), (6, 7, 3), (7, 2, 5), (40, 3, 5), (9, 0, 4)])
@pytest.mark.parametrize("pair", [False, True])
def test_what_is_kept_of_a_first_call(n, sinks, window, pair, dtype):
    """Token by token: the first stand in front, the last at the end, and what is not there is zero."""
    k, far = (torch.randn(2, 3, n, 24, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(2))
    v = torch.randn(2, n, 3, 20, device=DEVICE).to(dtype)
    keys, values = first_kept(k, v, far if pair else None, sinks, window)
    whole = torch.cat([k, far], -1) if pair else k
    for kept, x in ((keys, whole), (values, v)):
        assert kept.shape == (2, sinks + window, *x.shape[2:]) and kept.dtype == dtype
        for place in range(sinks + window):
            token = place if place < sinks else n - (sinks + window) + place
            want = x[:, token] if 0 <= token < n else torch.zeros_like(x[:, 0])
            assert torch.equal(kept[:, place], want)


def test_gradients_reach_what_is_kept():
    k, v = torch.randn(1, 9, 2, 8, device=DEVICE, requires_grad=True), torch.randn(1, 9, 2, 8, device=DEVICE, requires_grad=True)
    keys, values = first_kept(k, v, k, 2, 3)
    (keys.sum() + values.sum()).backward()
    seen = torch.tensor([1.0, 1, 0, 0, 0, 0, 1, 1, 1], device=DEVICE)
    assert torch.equal(v.grad[0, :, 0, 0], seen) and torch.equal(k.grad[0, :, 0, 0], 2 * seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, options", [(17, {}), (40, {"far_rotary": False}), (33, {"affine_factors": True, "sinks": 0}), (9, {})])
def test_a_first_call_without_gradients_is_that_with_them(n, options, dtype, firsts):
    """The same kernels, launched by another path; and, where nothing is past, by the one path."""
    module = make(window=5, **{"sinks": 3, **options}).to(dtype)
    q, k, v = inputs(module, n, dtype=dtype)
    o, state = module(q, k, v, rotary=angles(torch.arange(n)), return_state=True)
    assert o.requires_grad and not firsts
    with torch.no_grad():
        alike, same = module(q, k, v, rotary=angles(torch.arange(n)), return_state=True)
        alone = module(q, k, v, rotary=angles(torch.arange(n)))
    assert len(firsts) == (2 if n > 9 else 0)
    assert torch.equal(o, alike) and torch.equal(o, alone) and torch.equal(state.length, same.length)
    assert state.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(x, same[name]) for name, x in state.tensors.items())


def test_a_first_call_reads_factors_that_are_apart(firsts):
    module = make(sinks=2)
    module.window_factor = torch.nn.Parameter(torch.tensor([-2.0, 9, 1, -9, -1, 9, 3, -9], device=DEVICE)[::2])
    x, rotary = inputs(module, N), angles(torch.arange(N))
    with torch.no_grad():
        found = module(*x, rotary=rotary)
        wanted = defined(module, x, rotary)
    assert firsts and module.window_factor.stride() == (2,)
    assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_maps_made_of_others(tokens):
    """As by `torch.nn.utils.parametrize`: then W_q is no parameter."""
    module, plain = (make(sinks=2) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    plain.W_q.data.tanh_()
    torch.nn.utils.parametrize.register_parametrization(module, "W_q", torch.nn.Tanh())
    x, rotary = inputs(module), angles(torch.arange(N))
    found, _ = one_by_one(module, x, rotary, started(module, x, rotary, N - 1), N - 1)
    wanted = defined(plain, x, rotary)[:, N - 1 :]
    assert len(tokens) == 1
    assert (found.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_methods_of_a_subclass_are_called(tokens, firsts):
    class Sharper(lolcats.Lolcats):
        def features(self, name, x):
            return super().features(name, 3 * x)

    module = Sharper(4, 16, kv_heads=2, window=5, feature_dim=16).to(DEVICE)
    plain = copy.deepcopy(module)
    plain.__class__ = lolcats.Lolcats
    for p in (plain.W_q, plain.W_k):
        p.data *= 3
    x, rotary = inputs(module), angles(torch.arange(N))
    with torch.no_grad():
        found = module(*(y[:, :-1] for y in x), rotary=rotary.narrow(0, N - 1))
    last, _ = one_by_one(module, x, rotary, started(module, x, rotary, N - 1), N - 1)
    wanted = defined(plain, x, rotary)
    assert not tokens and not firsts
    assert (torch.cat([found, last], 1).double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
