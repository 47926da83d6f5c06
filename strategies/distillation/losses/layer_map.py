"""Which layer of the student learns from which layer of its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Pairs = tuple[tuple[int, int], ...]


def layer_map(student_layers: int, teacher_layers: int, how: str | Iterable[Sequence[int]]) -> Pairs:
    """Pairs (student layer, teacher layer), in the order of the student's; blocks are numbered from 0.

    With S layers of the student, T of the teacher and both numbered from 1, "uniform" is g(m) = floor(m T / S), last
    to last: where S divides T, TinyBERT's g(m) = m T / S (Jiao et al. 2020). "last" is the pair of the last two alone
    (MiniLM, Wang et al. 2020, section 3).

    Args:
        student_layers, teacher_layers: numbers of blocks.
        how: "uniform", "last", or the pairs themselves. Several of the student's layers may learn from one.

    Raises:
        ValueError: a model without layers, an unknown word, no pair, a layer out of range, a layer of the student
            twice, or a teacher with fewer layers than "uniform" needs.
    """
    for name, count in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if count < 1:
            raise ValueError(f"{name} = {count}: a model has at least one layer")
    if how == "last":
        return ((student_layers - 1, teacher_layers - 1),)
    if how == "uniform":
        return _uniform(student_layers, teacher_layers)
    if isinstance(how, str):
        raise ValueError(f"how = {how!r}: there are 'uniform', 'last' and pairs (student layer, teacher layer)")
    return _explicit(student_layers, teacher_layers, how)


def _uniform(student_layers: int, teacher_layers: int) -> Pairs:
    if teacher_layers < student_layers:
        raise ValueError(f"how = 'uniform': the teacher's {teacher_layers} layers cannot be spread over the student's "
                         f"{student_layers}; give pairs, or 'last'")
    return tuple((layer, (layer + 1) * teacher_layers // student_layers - 1) for layer in range(student_layers))


def _explicit(student_layers: int, teacher_layers: int, how: Iterable[Sequence[int]]) -> Pairs:
    pairs: dict[int, int] = {}
    for pair in how:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(layer) is int for layer in pair):
            raise ValueError(f"how has {pair}: a pair is two whole numbers (student layer, teacher layer)")
        for whose, layer, count in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if not 0 <= layer < count:
                raise ValueError(f"how has the pair {pair}: the {whose}'s layers are 0 to {count - 1}")
        if pair[0] in pairs:
            raise ValueError(f"how has layer {pair[0]} of the student twice, with teacher layers {pairs[pair[0]]} and "
                             f"{pair[1]}; keep one")
        pairs[pair[0]] = pair[1]
    if not pairs:
        raise ValueError("how has no pair; give at least one (student layer, teacher layer)")
    return tuple(sorted(pairs.items()))
