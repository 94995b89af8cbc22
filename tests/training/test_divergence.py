"""What a student is judged by."""

from __future__ import annotations

import pytest
import torch

from kbitc.errors import UsageError
from kbitc.training.divergence import Logits, Values, divergence, pooled, targets


def test_logits_bound_the_divergence_from_below_and_are_exact_where_all_are_kept():
    torch.manual_seed(0)
    teacher, student = torch.randn(1, 5, 99, dtype=torch.float64) * 3, torch.randn(1, 5, 99) * 3
    p, q = teacher.log_softmax(-1), student.double().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    assert float(Logits.of(0, teacher, 99).divergence(student)) == pytest.approx(exact, rel=1e-5)
    assert 0.7 * exact < float(Logits.of(0, teacher).divergence(student)) < exact
    assert float(Logits.of(0, student).divergence(student)) == pytest.approx(0, abs=1e-5)


def test_its_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    kept = Logits.of(0, torch.randn(4, 99) * 3, 10)
    student = (torch.randn(4, 99) * 3).requires_grad_()
    kept.divergence(student).backward()
    again = student.detach().double().requires_grad_()
    p, q = kept.logs.double().exp(), again.softmax(-1).gather(-1, kept.ids.long())
    p, q = (torch.cat([m, 1 - m.sum(-1, keepdim=True)], -1) for m in (p, q))
    (p * (p / q).log()).sum().backward()
    torch.testing.assert_close(student.grad, again.grad.float(), rtol=1e-4, atol=1e-6)


def test_other_outputs_are_judged_by_their_relative_error():
    teacher = torch.full((2, 3, 4), 2.0)
    kept = Values.of(0, teacher)
    assert kept.positions == 6
    assert float(kept.divergence(teacher * 1.1)) == pytest.approx(6 * 0.1**2 / 2)


def test_an_output_is_as_wide_as_it_is_over_all_windows():
    ones, threes, logits = torch.ones(2, 4), torch.full((2, 4), 3.0), torch.randn(2, 9)
    windows = [targets([x, logits], None, None) for x in (ones, threes)]
    found = pooled(windows)
    assert [[t.at for t in kept] for kept in found] == [[0, 1], [0, 1]]
    assert [kept[0].square for kept in found] == [5.0, 5.0]
    assert float(found[0][0].divergence(ones * 1.1)) == pytest.approx(2 * 0.1**2 / 2 / 5, rel=1e-4)
    both = [targets([x], 9, None) for x in (logits, logits)]
    assert pooled(both) == both


def test_which_outputs_count():
    logits, hidden, ids = torch.randn(1, 7, 50), torch.randn(1, 7, 8), torch.zeros(1, 7, dtype=torch.int64)
    assert [(type(t), t.at) for t in targets([ids, hidden, logits], 50, None)] == [(Logits, 2)]
    assert [(type(t), t.at) for t in targets([ids, hidden, logits], None, None)] == [(Values, 1), (Values, 2)]
    assert [(type(t), t.at) for t in targets([logits, hidden], None, (1, 7))] == [(Logits, 0)]
    with pytest.raises(UsageError, match="nothing to tune"):
        targets([ids], 50, None)
    kept = targets([hidden, hidden * 3], None, None)
    assert float(divergence([hidden * 1.1, hidden * 3], kept)) == pytest.approx(0.005, rel=1e-3)
