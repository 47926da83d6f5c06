"""Which layer learns from which."""

import pytest

from strategies.distillation.losses.layer_map import layer_map


def test_uniform_is_tinyberts_map():
    """Numbered from 1, g(m) = 3 m for 4 layers of 12."""
    assert layer_map(4, 12, "uniform") == tuple((m - 1, 3 * m - 1) for m in (1, 2, 3, 4))


@pytest.mark.parametrize("teacher", range(1, 30))
def test_uniform_spreads_as_evenly_as_whole_numbers_can(teacher):
    for student in range(1, teacher + 1):
        pairs = layer_map(student, teacher, "uniform")
        assert [layer for layer, _ in pairs] == list(range(student)) and pairs[-1][1] == teacher - 1
        ends = [-1, *(layer for _, layer in pairs)]
        steps = {after - before for before, after in zip(ends, ends[1:], strict=False)}
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1


def test_last_is_the_last_two():
    assert layer_map(3, 24, "last") == ((2, 23),)
    assert layer_map(6, 2, "last") == ((5, 1),)


def test_pairs_are_taken_as_given_in_the_students_order():
    assert layer_map(3, 6, [[2, 5], [0, 1]]) == ((0, 1), (2, 5))
    assert layer_map(3, 6, ((0, 5), (1, 5))) == ((0, 5), (1, 5)), "layers may share a teacher"


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 3, "last"), "student_layers = 0: a model has at least one layer"),
    ((3, -1, "uniform"), "teacher_layers = -1: a model has at least one layer"),
    ((3, 2, "uniform"), "the teacher's 2 layers cannot be spread over the student's 3; give pairs, or 'last'"),
    ((3, 6, "evenly"), "how = 'evenly': there are 'uniform', 'last' and pairs"),
    ((3, 6, []), "how has no pair; give at least one"),
    ((3, 6, [(3, 1)]), r"how has the pair \(3, 1\): the student's layers are 0 to 2"),
    ((3, 6, [(0, 6)]), r"how has the pair \(0, 6\): the teacher's layers are 0 to 5"),
    ((3, 6, [(-1, 5)]), r"how has the pair \(-1, 5\): the student's layers are 0 to 2"),
    ((3, 6, [(1, -1)]), r"how has the pair \(1, -1\): the teacher's layers are 0 to 5"),
    ((3, 6, [(1, 2), (1, 4)]), "how has layer 1 of the student twice, with teacher layers 2 and 4; keep one"),
    ((3, 6, [(1, 2, 3)]), r"how has \(1, 2, 3\): a pair is two whole numbers"),
    ((3, 6, [(1, 2.0)]), r"how has \(1, 2.0\): a pair is two whole numbers"),
    ((3, 6, [1, 2]), "how has 1: a pair is two whole numbers"),
])
def test_what_is_no_map_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_map(*arguments)
