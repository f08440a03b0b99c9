"""The losses of fine-tuning, against their formulas in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.convert.loss import ROWS, divergence, labels_of, next_token_loss


def test_labels_and_padding():
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1]])
    assert labels_of({"input_ids": ids}).tolist() == [[6, 7, 8]]
    assert labels_of({"input_ids": ids, "attention_mask": mask}).tolist() == [[-100, 7, 8]]
    assert labels_of({"input_ids": ids, "labels": torch.tensor([[-100, -100, 9, 8]])}).tolist() == [[-100, 9, 8]]
    scores = torch.randn(1, 4, 4)
    labels = torch.tensor([[-100, 2, 1]])
    assert float(next_token_loss(scores, labels)) == pytest.approx(-float(scores[0, 1].log_softmax(0)[2] + scores[0, 2].log_softmax(0)[1]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_next_tokens_by_parts_are_cross_entropy(dtype, tolerance):
    logits = (4 * torch.randn(3, ROWS // 2 + 7, 50)).to(dtype).requires_grad_()  # two parts, the second not whole
    labels = torch.randint(50, (3, logits.shape[1] - 1))
    labels[0, :5] = -100
    plain = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    found = next_token_loss(logits, labels)
    (0.3 * found).backward(), (0.3 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=min(tolerance, 1e-4))
    assert logits.grad.dtype == dtype and (logits.grad - plain.grad).abs().max() <= tolerance * plain.grad.abs().max()
    assert not logits.grad[0, :5].any() and not logits.grad[:, -1].any()
    assert float(next_token_loss(logits, torch.full_like(labels, -100))) == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_divergence_by_parts_is_its_formula(dtype, tolerance):
    shape = (3, ROWS // 2 + 7, 50)  # two parts, the second not whole
    logits, target = (4 * torch.randn(shape)).to(dtype).requires_grad_(), (4 * torch.randn(shape)).to(dtype).requires_grad_()
    labels = torch.randint(50, (3, shape[1] - 1))
    labels[0, :5] = -100
    plain, seen = logits.detach().double().requires_grad_(), labels != -100
    p, q = target.detach().double()[:, :-1].softmax(-1), plain[:, :-1].softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[seen].sum()
    found = divergence(logits, labels, target)
    (0.3 * found).backward(), (0.3 * expected).backward()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=min(tolerance, 1e-4))
    assert logits.grad.dtype == dtype and (logits.grad - plain.grad).abs().max() <= tolerance * plain.grad.abs().max()
    assert not logits.grad[0, :5].any() and not logits.grad[:, -1].any() and target.grad is None


def test_the_gradient_of_the_divergence_is_that_of_its_values():
    logits, target = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 2, 1], [0, -100, 3]])
    assert torch.autograd.gradcheck(lambda x: divergence(x, labels, target), logits)


def test_tokens_that_a_teacher_forbids_count_nothing():
    logits, target = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    target[..., 2], labels = -math.inf, torch.tensor([[3, 5, 1]])
    logits.requires_grad_()
    p, q = target[:, :-1].softmax(-1), logits[:, :-1].softmax(-1)
    some = [0, 1, 3, 4, 5]
    expected = (p[..., some] * (p[..., some] / q[..., some]).log()).sum()
    found = divergence(logits, labels, target)
    (first,), (second,) = (torch.autograd.grad(one, logits) for one in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    both = logits.detach().clone()
    both[..., 2] = -math.inf  # the student too
    left = divergence(both, labels, target)
    torch.testing.assert_close(
        left, divergence(logits.detach()[..., some], torch.zeros_like(labels), target[..., some]), rtol=1e-12, atol=1e-12
    )


def test_what_is_no_number_where_nothing_is_predicted_does_not_count():
    logits, target = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    labels = torch.tensor([[-100, 2, 1]])
    clean = logits.clone().requires_grad_()
    expected = divergence(clean, labels, target)
    expected.backward()
    for bad in (math.nan, math.inf, -math.inf):
        dirty, other = logits.clone(), target.clone()
        dirty[0, [0, 3]], other[0, [0, 3]] = bad, bad
        dirty.requires_grad_()
        loss = divergence(dirty, labels, other)
        loss.backward()
        assert torch.equal(loss, expected) and torch.equal(dirty.grad, clean.grad)
    nothing = divergence(dirty, torch.full_like(labels, -100), other)
    assert nothing.item() == 0


def test_a_teacher_without_numbers_at_padding_teaches_the_rest():
    scores, target = torch.randn(1, 4, 4, requires_grad=True), torch.randn(1, 4, 4)
    target[0, 0] = torch.nan
    loss = divergence(scores, torch.tensor([[-100, 2, 1]]), target)
    loss.backward()
    p = target[0, 1:3].softmax(-1)
    assert loss.item() == pytest.approx(float((p * (p.log() - scores[0, 1:3].detach().log_softmax(-1))).sum()), rel=1e-5)
    none = torch.zeros(1, 4)
    torch.testing.assert_close(scores.grad[0], torch.cat([none, scores[0, 1:3].detach().softmax(-1) - p, none]))


@pytest.mark.parametrize("loss", [next_token_loss, divergence])
def test_no_loss_makes_a_float32_copy(loss):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.largest = max(self.largest, out.numel())
            return out

    logits, target = torch.randn(4, ROWS, 64).bfloat16().requires_grad_(), torch.randn(4, ROWS, 64).bfloat16()
    with Sizes() as sizes:
        loss(logits, torch.randint(64, (4, ROWS - 1)), *([target] if loss is divergence else [])).backward()
    assert 0 < sizes.largest <= ROWS * 64
