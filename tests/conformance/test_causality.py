"""Causal mechanisms do not see the future: by perturbing a token, and by the gradient."""

import torch
from conformance.cases import causal, every, noise

TOKENS = (0, 1, 15, 16, 23, 24, 31, 47, 63, 64, 65, 100, 128, 129)  # both sides of the borders of chunks, blocks and windows


@every(causal, with_variants=True)
def test_outputs_before_a_changed_token_stay(case):
    """Row i of the batch has token TOKENS[i] changed in every input."""
    module = case.make()
    one = case.inputs(130, module, batch=1)
    rows = {name: t.expand(len(TOKENS), *t.shape[1:]) for name, t in one.items()}
    changed = {name: t.clone() for name, t in rows.items()}
    other = case.inputs(130, module, batch=len(TOKENS), seed=1)
    for row, token in enumerate(TOKENS):
        for name in filter(case.has_tokens, changed):
            changed[name][row, token] = other[name][row, token]
    moved = (case.run(module, rows) - case.run(module, changed)).abs().amax((2, 3))
    for row, token in enumerate(TOKENS):
        assert moved[row, :token].sum() <= 1e-12 * token, f"a change of token {token} is seen before it"
        assert moved[row, token] > 1e-6, f"a change of token {token} is not seen by itself"


@every(causal)
def test_no_gradient_from_the_future(case):
    module = case.make()
    for token in (0, 17, 63, 64, 90):
        x = {name: t.requires_grad_() for name, t in case.inputs(130, module).items()}
        o = case.run(module, x)[:, token]
        found = torch.autograd.grad(o, list(x.values()), noise(o), allow_unused=True)
        for name, g in zip(x, found):
            if g is not None and case.has_tokens(name):
                assert g[:, token + 1 :].abs().max() <= 1e-12, f"token {token}'s output has a gradient in later {name}"
        assert any(g is not None and g[:, : token + 1].abs().max() > 1e-6 for g in found)


@every(lambda case: not case.causal)
def test_bidirectional_sees_the_future(case):
    module = case.make()
    x = case.inputs(130, module, batch=1)
    changed = {**x, "v": x["v"].clone()}
    changed["v"][:, -1] += 1
    moved = (case.run(module, x) - case.run(module, changed)).abs().amax((0, 2, 3))
    near = 2 if case.card.family == "sparse" else 8  # a window on a grid ends a few columns off
    assert moved[-near:].min() > 1e-8, "the last token is not seen by the tokens just before it"
