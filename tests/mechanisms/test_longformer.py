"""Longformer with projections of its own for global tokens, against transformers' and against its parts."""

import copy
import pickle

import pytest
import torch

import subquad
from subquad import InputError


def make(global_tokens=2, **sizes):
    torch.manual_seed(0)
    sizes = {"kv_heads": 2, "window": 8, "global_tokens": global_tokens, "global_projections": True, **sizes}
    return subquad.attention("longformer", 4, 8, **sizes).double()


def inputs(n, batch=1, heads=(4, 2, 2)):
    return [torch.randn(batch, n, h, 8, dtype=torch.float64) for h in heads]


@pytest.mark.parametrize("global_tokens", [0, 1, 5])
def test_it_is_the_attention_of_transformers(global_tokens):
    """With the weights of `LongformerSelfAttention`, by the names they have there."""
    modeling = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer", reason="this version of transformers has no such model to compare with"
    )
    torch.manual_seed(0)
    config = modeling.LongformerConfig(hidden_size=32, num_attention_heads=4, attention_window=[8], num_hidden_layers=1)
    theirs = modeling.LongformerSelfAttention(config, 0).double().eval()
    ours = make(global_tokens, kv_heads=4, hidden_size=32)
    ours.load_state_dict({name: x for name, x in theirs.state_dict().items() if "global" in name})
    hidden = torch.randn(2, 48, 32, dtype=torch.float64)
    mask = torch.zeros(2, 48, dtype=torch.float64)
    mask[:, :global_tokens] = 10000.0
    known = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": global_tokens > 0}
    expected = theirs(hidden, attention_mask=mask, **known)[0]
    q, k, v = (layer(hidden).unflatten(2, (4, 8)) for layer in (theirs.query, theirs.key, theirs.value))
    torch.testing.assert_close(ours(q, k, v, hidden=hidden).flatten(2), expected)


def test_copies_of_the_projections_change_nothing():
    x = inputs(40, 2)
    own = dict(zip(("global_q", "global_k", "global_v"), x))
    torch.testing.assert_close(make()(*x, **own), make(global_projections=False)(*x))


def test_what_is_read_where():
    """Global rows follow their own inputs alone, all other rows the window's alone; queries of other rows are not read."""
    module, names = make(), ("global_q", "global_k", "global_v")
    x, own = inputs(30), inputs(30)

    def moved(x_changed, own_changed):
        one, other = (module(*a, **dict(zip(names, b))) for a, b in ((x, own), (x_changed, own_changed)))
        return (one != other).any(-1).any(-1)[0].nonzero().flatten().tolist()

    assert moved(inputs(30), own) == list(range(2, 30))
    assert moved(x, inputs(30)) == [0, 1]
    assert moved(x, [torch.cat([own[0][:, :2], inputs(28)[0]], 1), *own[1:]]) == []


def test_packed_sequences_have_global_tokens_of_their_own():
    module, lengths = make(3), (1, 20, 0, 2, 33)
    parts = [[*inputs(n), *inputs(n)] for n in lengths]
    names = ("q", "k", "v", "global_q", "global_k", "global_v")
    packed = {name: torch.cat([part[i] for part in parts], 1) for i, name in enumerate(names)}
    o = module(**packed, cu_seqlens=torch.tensor([0, 1, 21, 21, 23, 56]))
    torch.testing.assert_close(o, torch.cat([module(**dict(zip(names, part))) for part in parts], 1))


def test_the_card_of_a_module_names_its_inputs():
    module, plain = make(hidden_size=24), make(hidden_size=24, global_projections=False)
    assert list(module.card.inputs) == ["global_q", "global_k", "global_v"] and module.card.needs_hidden
    assert not plain.card.needs_hidden and not subquad.card("longformer").needs_hidden and not list(plain.parameters())
    x, hidden = inputs(20), torch.randn(1, 20, 24, dtype=torch.float64)
    expected = module(*x, hidden=hidden)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*x, hidden=hidden), expected)
    with pytest.raises(InputError, match="global_q"):
        make()(*x, hidden=hidden)  # made without hidden_size
    with pytest.raises(InputError, match="global_v"):
        make()(*x, global_q=x[0], global_k=x[1], global_v=x[2][..., :-1])


def test_the_projections_learn():
    module, x = make(hidden_size=24), inputs(20)
    module(*x, hidden=torch.randn(1, 20, 24, dtype=torch.float64)).square().sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad.abs().max() > 1e-6) or name == "key_global.bias", name  # a softmax does not see its keys' bias
