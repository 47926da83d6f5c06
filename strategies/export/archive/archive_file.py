"""The Deep Compression archive: weight sharing, pruning with relative positions, Huffman codes (Han et al. 2016).

An archive is a safetensors file. For each coded tensor NAME it holds

    codebook/NAME       [levels] the shared values, most frequent first
    index/NAME          [bytes] Huffman codes of each weight's index in the codebook, in row-major order
    index_lengths/NAME  [alphabet] lengths of these codes, which are canonical
    gap/NAME            [bytes], and gap_lengths/NAME: positions, if weights of the first value are left out (pruned)
    scale/NAME, zero_point/NAME     (outputs, groups): only for a quantized layer; weight = scale * (value - zero_point)

and raw/NAME for every other tensor. The metadata `coded` is JSON: for each NAME its `shape`, `dtype`, and for `index`
and `gap` the `levels`, `block` and `count` of a `huffman.Stream`. `same` is JSON that maps names of tied tensors to the
name that is stored. `sha256` is the checksum of the whole file with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from strategies.export.archive.clustering import cluster, commonest_first, positions, relative_positions
from strategies.export.archive.huffman import Stream, compress, entropy_bits, expand
from strategies.export.quantized_layers import Quantized, part_name, quantized_layers, weight_name

FORMAT = "limbeck-deep-compression-1"
GAP_BITS = (5, 8)  # bits of a position, the paper's for linear layers and for convolutions; the smaller result is used
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_PARTS = ("first_ratio", "log_ratio", "scale", "zero_point")  # of a quantized layer; stored in another form here

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ArchiveReport:
    """The size of an archive.

    Attributes:
        bytes: of the file.
        entropy_bytes: lower bound for any code of single weights: the entropy of the values of each tensor, plus its
            codebook and scales, plus the tensors that are not coded.
        header_bytes: part of the file taken by names, shapes and code lengths.
        dense_bytes: of all tensors in the model's dtypes.
        weights: number of weights that are coded.
    """

    bytes: int
    entropy_bytes: int
    header_bytes: int
    dense_bytes: int
    weights: int


def write_archive(file: Path | str, model: nn.Module, bits: int = 5, rules: Sequence[tuple[str, int | None]] = (),
                  ignore: Iterable[str] = ()) -> ArchiveReport:
    """Write a model with shared weights, pruned ones left out, Huffman-coded (Han et al. 2016, sections 2-4).

    Matrices, kernels and embeddings are clustered into 2^bits values each. Weights that are exactly zero count as
    pruned and stay zero. Quantized layers keep their integers and scales, so that the archive has the weights that
    training used. Everything else is stored unchanged. The file is written under another name and then renamed.

    Args:
        file: the target; replaced if it exists.
        model: any module.
        bits: 1 to 8, for each tensor without a rule.
        rules: shell-style patterns of tensor names with their own bits, or None to store a tensor unchanged; the first
            match applies.
        ignore: patterns of tensors to store unchanged.

    Raises:
        ValueError: bits are out of range, a pattern matches nothing, or weights are not finite.
    """
    patterns = [(pattern, None) for pattern in ignore] + list(rules)
    state, layers = model.state_dict(), {
        weight_name(name, layer): layer for name, layer in quantized_layers(model)}
    _check_asked(state, bits, patterns)
    left_out = {part_name(name, layer, part) for name, layer in quantized_layers(model) for part in _PARTS}
    tensors, coded, same, entropy, seen = {}, {}, {}, 0.0, {}
    for name, tensor in state.items():
        first = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name) if tensor.numel() else name
        own = next((own for pattern, own in patterns if fnmatchcase(name, pattern)), bits)
        if name in left_out:
            continue
        if first != name:
            same[name] = first
        elif (values := _values(name, tensor, layers.get(name), own)) is None:
            tensors[f"raw/{name}"] = tensor.detach().cpu().contiguous()
        else:
            order, index = commonest_first(values[1], len(values[0]))
            codebook = values[0][torch.from_numpy(order)]
            parts, coded[name] = _coded(index, len(codebook))
            coded[name] |= {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            tensors |= {f"{part}/{name}": value for part, value in {**parts, **values[2], "codebook": codebook}.items()}
            entropy += entropy_bits(index) / 8
    data = _sealed(tensors, {"format": FORMAT, "coded": json.dumps(coded), "same": json.dumps(same)})
    _replace(Path(file), data)
    return _report(data, tensors, coded, same, entropy, state)


def read_archive(file: Path | str, most_bytes: int = 2**34) -> Tensors:
    """Read the tensors of an archive by their names in the model: a state dict for the unquantized model.

    Args:
        most_bytes: refuse files whose tensors would take more; declared sizes are checked before anything is allocated.

    Raises:
        ValueError: the file is not an archive, is truncated or modified, or its content does not match its metadata.
    """
    size = Path(file).stat().st_size
    if size > most_bytes or not Path(file).is_file():
        raise ValueError(f"{file} cannot be read as an archive: it is no file, or takes more than `most_bytes`, "
                         f"{most_bytes:,}")
    data = Path(file).read_bytes()
    try:
        metadata = _opened(data)
        tensors = load(data)
        coded, same = json.loads(metadata["coded"]), json.loads(metadata["same"])
        claimed = sum(_claim(entry) for entry in coded.values()) + len(data)
        if claimed > most_bytes:
            raise ValueError(f"its tensors would take {claimed:,} bytes, more than `most_bytes`, {most_bytes:,}")
        found = {name.removeprefix("raw/"): tensor for name, tensor in tensors.items() if name.startswith("raw/")}
        for name, entry in coded.items():
            parts = {part: tensors[f"{part}/{name}"] for part in (
                "codebook", "index", "index_lengths", "gap", "gap_lengths", "scale", "zero_point")
                if f"{part}/{name}" in tensors}
            found[name] = _decoded(parts, entry)
        return found | {name: found[first] for name, first in same.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError,
            SafetensorError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} cannot be read as an archive: {what}") from error


# ---- values that are shared

Values = tuple[torch.Tensor, numpy.ndarray, Tensors]


def _values(name: str, tensor: torch.Tensor, layer: Quantized | None, bits: int | None) -> Values | None:
    """Codebook, index of each weight (count,), and scales of a quantized layer; None if a tensor is not coded."""
    if layer is not None:
        return _numbers(layer)
    if bits is None or not tensor.is_floating_point() or tensor.ndim < 2 or tensor.numel() <= 2**bits:
        return None
    weights = tensor.detach().cpu().to(torch.float64 if tensor.dtype is torch.float64 else torch.float32).flatten()
    if not weights.isfinite().all():
        raise ValueError(f"{name}: a weight is not finite")
    kept, index = weights.numpy() != 0, numpy.zeros(len(weights), dtype=numpy.uint16)
    if not kept.any():
        return torch.zeros(1, dtype=tensor.dtype), index, {}
    centroids, index[kept] = cluster(weights.numpy()[kept], 2**bits)
    if not kept.all():  # zeros have their own codebook entry, so that they stay zero
        centroids = numpy.concatenate([[0.0], centroids])
        index[kept] += 1
    return torch.from_numpy(centroids).to(tensor.dtype), index, {}


def _numbers(layer: Quantized) -> Values:
    """The integers, scales and zero points of a quantized layer, unchanged."""
    if layer.matrix is not layer.weight:
        raise ValueError(f"an archive has the rows of a layer as they are, and a {type(layer).__name__} is not stored "
                         "in rows: leave it in full precision")
    grid = layer.grid()
    numbers = layer.numbers().detach().cpu().float().flatten()
    levels = numbers.unique()
    index = torch.searchsorted(levels, numbers)
    extra = {"scale": grid.scale.detach().cpu().contiguous()}
    if grid.zero_point is not None:
        extra["zero_point"] = grid.zero_point.detach().cpu().to(torch.int16).contiguous()
    return levels.to(grid.scale.dtype), index.numpy().astype(numpy.uint16), extra


# ---- streams

def _coded(index: numpy.ndarray, levels: int) -> tuple[Tensors, dict[str, Any]]:
    """Encode indices as tensors and their description: all of them, or nonzero ones with positions if that is smaller.

    The paper leaves out zeros; here index 0 is the most frequent value, which may be another one.
    """
    found, kept = [{"index": compress(index, levels)}], numpy.flatnonzero(index)
    if 0 < len(kept) < 0.5 * len(index):  # else positions alone take a bit per weight
        values = compress(index[kept] - 1, levels - 1)
        found += [{"index": values, "gap": compress(relative_positions(kept, len(index), 2**bits), 2**bits)}
                  for bits in GAP_BITS]
    best = min(found, key=lambda streams: sum(map(_size, streams.values())))
    parts = {}
    for part, stream in best.items():
        parts |= {part: torch.from_numpy(stream.bits), f"{part}_lengths": torch.from_numpy(stream.lengths)}
    return parts, {part: {"levels": stream.levels, "block": stream.block, "count": stream.count}
                   for part, stream in best.items()}


def _size(stream: Stream) -> int:
    return len(stream.bits) + len(stream.lengths)


def _claim(entry: dict[str, Any]) -> int:
    """Bytes that a coded tensor takes once decoded, from its description alone."""
    streams = [entry[part] for part in ("index", "gap") if part in entry]
    numbers = [*entry["shape"], *(value for stream in streams for value in stream.values())]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a shape or a count is no whole number: {numbers}")
    return math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize


def _decoded(parts: Tensors, entry: dict[str, Any]) -> torch.Tensor:
    """Decode a tensor; allocations are bounded by its shape, which the streams must fill exactly."""
    total, codebook, scale = math.prod(entry["shape"]), parts["codebook"], parts.get("scale")
    index = _expanded(parts, entry, "index")
    if "gap" in entry:
        places = positions(_expanded(parts, entry, "gap"), total, entry["gap"]["levels"])
        if len(places) != len(index):
            raise ValueError(f"there are {len(places):,} positions for {len(index):,} weights")
        index, values = numpy.zeros(total, dtype=numpy.uint16), index
        index[places] = values + 1
    if len(index) != total or (entry["index"]["levels"] + ("gap" in entry),) != codebook.shape:
        raise ValueError(f"{len(index):,} weights of {tuple(codebook.shape)} values do not fill the shape "
                         f"{entry['shape']}")
    weights = codebook[torch.from_numpy(index.astype(numpy.int32))]
    if scale is not None:
        zero_point = parts.get("zero_point", torch.zeros_like(scale))
        if scale.ndim != 2 or zero_point.shape != scale.shape:
            raise ValueError(f"scales {tuple(scale.shape)} and zero points {tuple(zero_point.shape)} differ")
        groups = weights.view(*scale.shape, -1) - zero_point.to(weights.dtype).unsqueeze(-1)
        weights = groups * scale.unsqueeze(-1)
    return weights.reshape(entry["shape"]).to(_DTYPES[entry["dtype"]])


def _expanded(parts: Tensors, entry: dict[str, Any], part: str) -> numpy.ndarray:
    bits, lengths = parts[part].numpy(), parts[f"{part}_lengths"].numpy()
    if not bits.dtype == lengths.dtype == numpy.uint8 or not bits.ndim == lengths.ndim == 1:
        raise ValueError("a stream is not of bytes")
    return expand(Stream(bits, lengths, **entry[part]))


# ---- the file

def _check_asked(state: Tensors, bits: int, patterns: Sequence[tuple[str, int | None]]) -> None:
    for own in [bits, *(own for _, own in patterns if own is not None)]:
        if not 1 <= own <= 8:
            raise ValueError(f"weights can share values of 1 to 8 bits, not {own}")
    for pattern, _ in patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise ValueError(f"the pattern {pattern!r} in `ignore` or `rules` matches no tensor; names look like "
                             f"{', '.join(list(state)[:3])}")


def _sealed(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file that contains its own checksum."""
    data = save(tensors, {**metadata, "sha256": "0" * 64})
    begin, end = _DIGEST.search(data).span(1)
    return data[:begin] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def _opened(data: bytes) -> dict[str, str]:
    """Verify the checksum of a file and return its metadata."""
    length = int.from_bytes(data[:8], "little")
    found = _DIGEST.search(data, 8, 8 + length) if 8 + length <= len(data) else None
    if found is None:
        raise ValueError("it is no archive, or was cut short")
    begin, end = found.span(1)
    digest = hashlib.sha256(data[:begin])
    digest.update(b"0" * 64)
    digest.update(memoryview(data)[end:])
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("its checksum is wrong: it was cut short or changed")
    metadata = json.loads(data[8:8 + length])["__metadata__"]
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
    return metadata


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)


def _report(data: bytes, tensors: Tensors, coded: dict[str, Any], same: dict[str, str], entropy: float,
            state: Tensors) -> ArchiveReport:
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    lengths = sum(size for name, size in sizes.items() if name.partition("/")[0].endswith("_lengths"))
    streams = sum(size for name, size in sizes.items() if name.partition("/")[0] in ("index", "gap"))
    payload = sum(sizes.values())
    return ArchiveReport(
        bytes=len(data), entropy_bytes=math.ceil(entropy) + payload - lengths - streams,
        header_bytes=len(data) - payload + lengths, weights=sum(math.prod(entry["shape"]) for entry in coded.values()),
        dense_bytes=sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name not in same))
