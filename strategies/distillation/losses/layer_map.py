"""Which layer of the student is matched to which layer of its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Pairs = tuple[tuple[int, int], ...]


def layer_map(student_layers: int, teacher_layers: int, how: str | Iterable[Sequence[int]]) -> Pairs:
    """Pairs (student layer, teacher layer), in order of the student's layers; blocks are numbered from 0.

    With S student and T teacher layers, here numbered from 1, "uniform" pairs m with g(m) = floor(m T / S), so the last
    with the last. If S divides T this is TinyBERT's g(m) = m T / S (Jiao et al. 2020). "last" pairs only the last
    layers (MiniLM, Wang et al. 2020, section 3).

    Args:
        student_layers, teacher_layers: numbers of blocks.
        how: "uniform", "last", or the pairs themselves. Several student layers may share a teacher layer.

    Raises:
        ValueError: a model has no layers, the word is unknown, there are no pairs, a layer is out of range, a student
            layer occurs twice, or the teacher has fewer layers than the student with "uniform".
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
