"""The Triton kernels of `delta_rule` against its definition, in every gradient; on CPU Triton interprets them."""

import pytest
import torch

from subquad.ops.delta.reference import delta_rule as reference

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad.ops import launch as table
from subquad.ops.delta.fused import delta_rule, delta_rule_op
from subquad.ops.linear import launch

NAMES = ("o", "state", "q", "k", "v", "beta", "log_decay", "initial_state")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def inputs(batch, tokens, heads, width, columns, *, decay=None, state=True, rows=None, strided=False, dtype=torch.float32):
    """q, k (norm 1), v, beta, log decays up to `decay`, and a state; heads is (q's, k's, v's)."""
    tensors = []
    for n, size in zip(heads, (width, width, columns)):
        shape = (batch, n, tokens, size + 5) if strided else (batch, tokens, n, size)
        tensors.append(torch.randn(shape))
    if strided:
        tensors = [x[..., :-5].transpose(1, 2) for x in tensors]
    tensors[1] = tensors[1] / tensors[1].norm(dim=-1, keepdim=True)
    hs = max(heads[1:])
    beta = torch.rand(batch, tokens, hs)
    g = None if decay is None else -torch.rand(batch, tokens, hs) * decay
    before = torch.randn(rows or batch, hs, width, columns) if state else None
    return [*(x.to(DEVICE, dtype) for x in tensors), *(None if x is None else x.to(DEVICE) for x in (beta, g, before))]


def check(given, cu=None, scale=None, limit=None):
    """o, the state and all gradients of the kernels are those of the definition in float64."""
    dtype, ends = given[0].dtype, None if cu is None else torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    scale = given[0].shape[-1] ** -0.5 if scale is None else scale
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    q, k, v, beta, g, before = exact
    want = reference(q, k, v, beta, log_decay=g, scale=scale, initial_state=before, return_state=True, cu_seqlens=ends)
    sent = [torch.randn_like(x).to(dtype if i == 0 else torch.float32) for i, x in enumerate(want)]
    leaves = [x for x in exact if x is not None]
    reached = [(x, y.double()) for x, y in zip(want, sent) if x.requires_grad]  # not o, if there are no tokens
    outs, cotangents = zip(*reached)
    grads = torch.autograd.grad(outs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    t = [None if x is None else x.detach().requires_grad_() for x in given]
    o, final = delta_rule(*t, ends, scale, True)
    found = torch.autograd.grad((o, final), [x for x in t if x is not None], sent)
    names = [name for name, x in zip(NAMES, (o, final, *t)) if x is not None]
    for name, a, b in zip(names, (o, final, *found), (*want, *grads)):
        assert a.isfinite().all(), name
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert error < (limit or LIMIT[dtype]), f"{name}: {error:.1e}"


@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("tokens", [1, 65, 130])
def test_lengths(tokens, decay):
    check(inputs(1, tokens, (1, 1, 1), 16, 16, decay=decay))


@pytest.mark.parametrize("decay, width, columns", [(None, 24, 72), (0.1, 24, 72), (0.1, 72, 24), (0.1, 16, 136)])
def test_widths_and_strides(decay, width, columns):
    check(inputs(2, 65, (1, 1, 1), width, columns, decay=decay, strided=True), scale=0.7)


@pytest.mark.parametrize("heads", [(2, 1, 2), (2, 2, 1), (1, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_heads(heads, decay):
    check(inputs(1, 40, heads, 16, 16, decay=decay))


@pytest.mark.parametrize("decay", [None, 0.1])
def test_packed(decay):
    ends = [0, 0, 3, 67, 67, 68, 150]
    check(inputs(1, 150, (1, 1, 1), 16, 16, decay=decay, rows=len(ends) - 1), cu=ends)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "beta", "log_decay", "initial_state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_gradient_alone_is_what_it_is_among_all(wanted, dtype):
    given = inputs(1, 70, (2, 2, 1), 24, 16, decay=0.1, dtype=dtype)
    got, among = {}, {}
    for into, names in ((got, [wanted]), (among, NAMES[2:])):
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in zip(NAMES[2:], given)}
        o, final = delta_rule(*leaves.values(), None, 0.25, True)
        into.update(zip(names, torch.autograd.grad((o.float().square().sum(), final.square().sum()), [leaves[x] for x in names])))
    assert among[wanted].any()
    torch.testing.assert_close(got[wanted], among[wanted], rtol=LIMIT[dtype], atol=LIMIT[dtype])


@pytest.mark.parametrize("decay", [5.0, 50.0])
def test_strong_decays(decay):
    check(inputs(1, 70, (1, 1, 1), 16, 16, decay=decay))


@pytest.fixture
def cut(monkeypatch):
    """Sequences are cut into segments; into how many, by kernel."""
    seen = {}

    def choose(*given):
        found = table.choose.__wrapped__(*given)
        seen[given[0]] = found[1]
        return found

    monkeypatch.setattr(table, "SEGMENT", 1)
    monkeypatch.setattr(table, "processors", lambda device: 16)
    monkeypatch.setattr(launch, "choose", choose)
    table.forget()
    yield seen
    table.forget()


@pytest.mark.parametrize("decay", [None, 0.1, 5.0])
def test_segments(decay, cut):
    check(inputs(1, 300, (1, 1, 1), 16, 64, decay=decay))
    assert cut["queries"] > 1 and cut["keys"] > 1


def test_strong_decays_in_some_segments_and_other_segments_in_each_direction(cut, monkeypatch):
    monkeypatch.setitem(table.TABLE, ("keys", 16, 32, "scalar"), 2 * (table.Config(16, 4, 1),))
    given = inputs(1, 600, (1, 1, 1), 64, 16, decay=0.1)
    given[4][:, 200:264] *= 50
    check(given)
    assert 1 < cut["keys"] < cut["queries"]


@pytest.mark.parametrize("width", [128, 129])
def test_wider_heads_than_the_solves_take(width, monkeypatch):
    from subquad.ops import delta

    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    q, k, v, beta, _, _ = inputs(1, 66, (1, 1, 1), width, 8, state=False)
    solved = []
    monkeypatch.setattr("subquad.ops.delta.fused.delta_rule", lambda *a: solved.append(1) or delta_rule(*a))
    o = delta.delta_rule(q, k, v, beta)
    assert len(solved) == (width <= 128)
    assert torch.allclose(o.double(), reference(*(x.double() for x in (q, k, v, beta))), atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.97, 1.0])
def test_repeated_keys(beta):
    given = inputs(1, 130, (1, 1, 1), 16, 16)
    given[1] = given[1][:, :1].expand(-1, 130, -1, -1).contiguous()
    given[3] = torch.full_like(given[3], beta)
    check(given)


def test_tiny_keys():
    given = inputs(1, 65, (1, 1, 1), 16, 16)
    given[1] = given[1] * 1e-4
    check(given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_half_precision(dtype, decay):
    check(inputs(1, 100, (1, 1, 1), 32, 16, decay=decay, dtype=dtype))


@pytest.mark.parametrize("decay", [None, 0.1])
def test_no_tokens(decay):
    check(inputs(1, 0, (2, 1, 1), 16, 16, decay=decay))


def test_traced():
    given = inputs(1, 70, (2, 1, 1), 16, 16, decay=0.1)
    given = [x.requires_grad_() for x in given]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(delta_rule_op, (*given, None, 0.25, True, True), test_utils=checks)


def test_deterministic():
    given = [x.requires_grad_() for x in inputs(1, 70, (1, 1, 1), 16, 16, decay=0.1)]
    runs = []
    for _ in range(2):
        o = delta_rule(*given, None, 0.25, False)[0]
        runs.append((o, *torch.autograd.grad(o.sum(), given)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("decay", [None, 0.1])
def test_one_export_serves_every_length(decay, monkeypatch):
    from subquad.ops.delta import delta_rule as public

    monkeypatch.setenv("SUBQUAD_KERNELS", "on")

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, beta, g):
            return public(q, k, v, beta, log_decay=g)

    given = inputs(1, 66, (1, 1, 1), 16, 16, decay=decay, state=False)[:5]
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = [None if x is None else {1: tokens} for x in given]
    exported = torch.export.export(Layer(), tuple(given), dynamic_shapes=shapes).module()
    for n in (20, 64, 66):
        part = [None if x is None else x[:, :n] for x in given]
        assert torch.allclose(exported(*part), Layer()(*part), atol=1e-6)
