"""The format of a teacher cache: its identity, the tensors of each kind of targets, and their size in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["hidden", "samples", "top_k"]
NEEDS = {"hidden": ("width",), "samples": ("vocabulary", "draws", "temperature"),
         "top_k": ("vocabulary", "k", "temperature")}
DTYPES = {"hidden": ("float32", "bfloat16", "float16"), "samples": ("float32", "float16"),
          "top_k": ("float32", "float16")}
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER = 2**16  # upper bound on the bytes of a shard's header


class CacheMismatch(ValueError):
    """The cache was made from other inputs than those requested."""


class CacheUnfinished(RuntimeError):
    """The cache does not have all of its rows yet."""


class CacheDamaged(RuntimeError):
    """A file of the cache differs from what was written."""


class CacheInUse(RuntimeError):
    """Another process is writing the cache."""


@dataclass(frozen=True)
class Identity:
    """What a cache was made from; a run can use a cache only if all of these fields agree.

    Attributes:
        kind: `hidden`, the teacher's last hidden states; `samples`, tokens drawn from it; or `top_k`, its most
            probable tokens.
        rows: number of training sequences.
        sequence_length: number of positions of each.
        teacher, tokenizer, data: fingerprints. `data` covers everything else that determines the content, such as the
            seed of the draws.
        dtype: of hidden states, or of log-probabilities. Rounding the latter gives identical models a divergence of up
            to 7e-4 nats per token in float16 and 2e-5 in float32, measured with 50 draws, and with k = 64 of 50 000
            tokens.
        width: of hidden states.
        vocabulary: number of columns of the teacher's logits.
        draws: number of draws at each position, for `samples`.
        k: number of tokens at each position, for `top_k`.
        temperature: of the softmax, for `samples` and `top_k`.

    Raises:
        ValueError: a field is missing, does not belong to the kind, or is out of range.
    """

    kind: Kind
    rows: int
    sequence_length: int
    teacher: str
    tokenizer: str
    data: str
    dtype: str = "float32"
    width: int | None = None
    vocabulary: int | None = None
    draws: int | None = None
    k: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in NEEDS:
            raise ValueError(f"there is no kind {self.kind!r} of targets; there are {', '.join(NEEDS)}")
        if self.dtype not in DTYPES[self.kind]:
            raise ValueError(f"dtype {self.dtype!r} is not kept for {self.kind}; {', '.join(DTYPES[self.kind])} are")
        for name in ("width", "vocabulary", "draws", "k", "temperature"):
            if (getattr(self, name) is not None) != (name in NEEDS[self.kind]):
                raise ValueError(f"{name} = {getattr(self, name)}: {self.kind} takes {', '.join(NEEDS[self.kind])}")
        for name in ("rows", "sequence_length", *NEEDS[self.kind]):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: a number above zero is expected")


@dataclass(frozen=True)
class Column:
    """One tensor of a shard: (tokens, *shape), or (distinct tokens drawn, *shape) if it is `ragged`.

    Attributes:
        element: a floating dtype; or n for integers from 0 to n - 1. Integers are stored in as few bytes as can hold
            them, little-endian, in a last dimension of uint8: a token id of a vocabulary of 150 000 takes 3 bytes.
        shape: of one entry.
        ragged: whether the number of entries per token varies.
    """

    element: torch.dtype | int
    shape: tuple[int, ...] = ()
    ragged: bool = False

    @property
    def integer_bytes(self) -> int:
        """Bytes of one integer."""
        return max(1, -(-(self.element - 1).bit_length() // 8))

    @property
    def bytes(self) -> int:
        """Bytes of one entry."""
        one = self.element.itemsize if isinstance(self.element, torch.dtype) else self.integer_bytes
        return one * math.prod(self.shape)

    def packed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Convert values to their stored form, a new tensor on the CPU.

        Raises:
            ValueError: an integer is out of range.
        """
        if isinstance(self.element, torch.dtype):
            return values.detach().to("cpu", self.element, copy=True).contiguous()
        values = values.to("cpu", torch.int64).contiguous()
        least, most = (int(bound) for bound in values.aminmax()) if values.numel() else (0, 0)
        if least < 0 or most >= self.element:
            raise ValueError(f"{name} has values from {least} to {most}, and this cache keeps 0 to {self.element - 1}")
        return values[..., None].view(torch.uint8)[..., :self.integer_bytes].clone()

    def unpacked(self, stored: torch.Tensor) -> torch.Tensor:
        """Convert a stored tensor back: integers to int64, floating dtypes unchanged."""
        if isinstance(self.element, torch.dtype):
            return stored
        wide = torch.zeros(*stored.shape[:-1], 8, dtype=torch.uint8)
        wide[..., :self.integer_bytes] = stored
        return wide.view(torch.int64)[..., 0]


def columns(identity: Identity) -> dict[str, Column]:
    """The tensors of a kind of cache by name; see `draw_samples` and `top_k` in `sampling`."""
    dtype: torch.dtype = getattr(torch, identity.dtype)
    if identity.kind == "hidden":
        return {"hidden": Column(dtype, (identity.width,))}
    if identity.kind == "top_k":
        k = (min(identity.k, identity.vocabulary),)
        return {"ids": Column(identity.vocabulary, k), "log_p": Column(dtype, k), "log_tail": Column(torch.float32)}
    most = min(identity.draws, identity.vocabulary)
    return {"distinct": Column(most + 1), "ids": Column(identity.vocabulary, ragged=True),
            "counts": Column(identity.draws + 1, ragged=True), "log_p": Column(dtype, ragged=True)}


def bytes_per_token(identity: Identity, distinct: float | None = None) -> float:
    """Bytes on disk for each token that has a target.

    Args:
        distinct: mean number of distinct tokens among the draws of a position, for `samples`; by default the largest
            possible number, which makes the result an upper bound.
    """
    if distinct is None:
        distinct = min(identity.draws, identity.vocabulary) if identity.kind == "samples" else 0
    return sum(column.bytes * (distinct if column.ragged else 1) for column in columns(identity).values())


def total_bytes(identity: Identity, tokens: int, distinct: float | None = None) -> int:
    """Bytes on disk of a cache for `tokens` tokens with targets, without headers (about half a kilobyte per shard)."""
    offsets = 16 if identity.kind == "samples" else 8
    return math.ceil(tokens * bytes_per_token(identity, distinct)) + offsets * identity.rows


def largest_shard(identity: Identity, rows: int) -> int:
    """Upper bound on the bytes of a shard of this many rows, including its header."""
    return math.ceil(rows * identity.sequence_length * bytes_per_token(identity)) + 16 * (rows + 1) + HEADER


def stored(identity: Identity, rows: int, ends: dict[bool, int]) -> dict[str, tuple[str, list[int]]]:
    """Name, safetensors dtype and shape of all tensors of a shard.

    Args:
        ends: number of entries of ragged tensors (True) and of the others (False).
    """
    found = {"offsets": ("I64", [rows + 1])}
    if True in ends:
        found["drawn_offsets"] = ("I64", [rows + 1])
    for name, column in columns(identity).items():
        own = [] if isinstance(column.element, torch.dtype) else [column.integer_bytes]
        kind = SAFETENSORS[column.element] if not own else "U8"
        found[name] = kind, [ends[column.ragged], *column.shape, *own]
    return found


def fault_of(identity: Identity, content: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with values that were read, or None; they are used as indices later without another check."""
    for name, column in columns(identity).items():
        if isinstance(column.element, int) and (content[name] >= column.element).any():
            return f"{name} has values over {column.element - 1}"
    if identity.kind == "samples" and int(content["distinct"].sum()) != len(content["ids"]):
        return "distinct does not count the tokens drawn"
    return None


def by_row(identity: Identity, content: Mapping[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Split the concatenated content of some rows into the packed tensors of each row.

    Args:
        content: the tensors of `columns`, and `tokens` (rows,), the number of positions with a target in each row.

    Raises:
        ValueError: names, shapes, dtypes or values do not match the kind.
    """
    wanted = columns(identity)
    if content.keys() != {"tokens", *wanted}:
        raise ValueError(f"content of {identity.kind} has tokens, {', '.join(wanted)}; given are {', '.join(content)}")
    tokens = content["tokens"].tolist()
    if len(tokens) != rows or not all(0 <= count <= identity.sequence_length for count in tokens):
        raise ValueError(f"tokens = {tokens}: for each of {rows} rows a number of learned positions from 0 to "
                         f"{identity.sequence_length} is expected")
    draws = _drawn_of_rows(identity, content, tokens) if identity.kind == "samples" else []
    parts: list[dict[str, torch.Tensor]] = [{} for _ in tokens]
    for name, column in wanted.items():
        sizes = draws if column.ragged else tokens
        _check_column(name, column, content[name], sum(sizes))
        for part, values in zip(parts, column.packed(name, content[name]).split(sizes), strict=True):
            part[name] = values
    return parts


def _drawn_of_rows(identity: Identity, content: Mapping[str, torch.Tensor], tokens: list[int]) -> list[int]:
    """The number of entries of ragged tensors in each row: distinct tokens drawn, summed over its positions."""
    _check_column("distinct", columns(identity)["distinct"], content["distinct"], sum(tokens))
    total = int(content["counts"].sum())
    if total != identity.draws * sum(tokens):
        raise ValueError(f"counts add up to {total}, and {identity.draws} draws of {sum(tokens)} positions to "
                         f"{identity.draws * sum(tokens)}")
    return [int(part.sum()) for part in content["distinct"].split(tokens)]


def _check_column(name: str, column: Column, values: torch.Tensor, size: int) -> None:
    if values.shape != (size, *column.shape):
        raise ValueError(f"{name} of shape {tuple(values.shape)} is not the content of these rows, which has shape "
                         f"{(size, *column.shape)}")
    is_float = isinstance(column.element, torch.dtype)
    if values.is_floating_point() != is_float or name == "hidden" and values.dtype != column.element:
        wanted = column.element if is_float else "integers"
        raise ValueError(f"{name} is {values.dtype}, and {wanted} in this cache")
    if is_float and (values.isnan().any() or name == "hidden" and values.isinf().any()):
        raise ValueError(f"{name} has values that are not finite: a teacher that overflows in float16 needs bfloat16 "
                         "or float32")
