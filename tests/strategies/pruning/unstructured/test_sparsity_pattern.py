"""Patterns of zeros: what they keep, and which are refused."""

import pytest
import torch

from strategies.pruning.unstructured.sparsity_pattern import Pattern


def test_a_share_is_taken_from_the_whole_matrix_or_from_each_row():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    whole, rows = Pattern.parse(0.5).largest(scores), Pattern.parse(0.5).largest(scores, per_row=True)
    assert whole.tolist() == [[True] * 4, [False] * 4]
    assert rows.tolist() == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize(("name", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("3:5", 3, 5)])
def test_n_of_every_m_are_kept(name, kept, of):
    pattern, scores = Pattern.parse(pattern=name), torch.randn(6, 40)
    mask = pattern.largest(scores)
    assert pattern.sparsity == 1 - kept / of and str(pattern) == name
    for scored, taken in zip(scores.view(-1, of), mask.view(-1, of), strict=True):
        assert int(taken.sum()) == kept and scored[taken].min() > scored[~taken].max()


@pytest.mark.parametrize("asked", [{}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.0}, {"sparsity": 1.0},
                                   {"sparsity": float("nan")}, {"pattern": "4:4"}, {"pattern": "0:4"},
                                   {"pattern": "4:2"}, {"pattern": "2/4"}, {"pattern": "2:4:8"}], ids=str)
def test_what_is_no_pattern_is_refused(asked):
    with pytest.raises(ValueError, match="such as"):
        Pattern.parse(**asked)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="q_proj has 30 inputs, which do not divide into groups of 4"):
        Pattern.parse(pattern="2:4").check(30, "q_proj")
