"""Canonical Huffman codes of single symbols or blocks of symbols, with compiled encoding and decoding."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy

from strategies.common.compiled import compiled

LONGEST = 56  # most bits of a code, so that it fits a 64-bit window from any bit of a byte
LARGEST_ALPHABET = 4096  # of blocks; beyond it, stored code lengths cost more than longer blocks save
_TABLE_BITS = 12  # codes of up to this length are decoded by a table lookup

_compiled = compiled()


def code_lengths(counts: numpy.ndarray) -> numpy.ndarray:
    """Lengths of an optimal prefix code (Huffman 1952), uint8; 0 for a symbol that does not occur.

    If there is only one symbol it gets one bit, so that no stream of symbols is empty.

    Args:
        counts: [alphabet] number of occurrences of each symbol.
    """
    heap = [(int(count), symbol, (symbol,)) for symbol, count in enumerate(counts) if count]
    lengths = numpy.zeros(len(counts), dtype=numpy.uint8)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        members = first[2] + second[2]
        lengths[list(members)] += 1
        heapq.heappush(heap, (first[0] + second[0], first[1], members))
    assert lengths.max(initial=0) <= LONGEST, "codes this long need more symbols than there is memory for"
    return lengths


def canonical(lengths: numpy.ndarray) -> numpy.ndarray:
    """Canonical codes, uint64, which follow from their lengths alone: counted up by length, then by symbol."""
    codes = numpy.zeros(len(lengths), dtype=numpy.uint64)
    code, before = 0, 0
    for symbol in numpy.lexsort((numpy.arange(len(lengths)), lengths)):
        if lengths[symbol]:
            code <<= int(lengths[symbol]) - before
            codes[symbol], before = code, int(lengths[symbol])
            code += 1
    return codes


def encode(symbols: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """The concatenated codes of symbols as uint8, highest bit first; the last byte is padded with zeros."""
    bits = int(lengths.astype(numpy.int64)[symbols].sum())
    stream = numpy.zeros(-(-bits // 8), dtype=numpy.uint8)
    _write(symbols.astype(numpy.int64), canonical(lengths), lengths.astype(numpy.int64), stream)
    return stream


def decode(stream: numpy.ndarray, lengths: numpy.ndarray, count: int) -> numpy.ndarray:
    """The symbols that were passed to `encode`, uint16.

    Allocation is bounded by the length of the stream.

    Args:
        stream: bytes, uint8.
        lengths: [alphabet] uint8 code lengths.
        count: number of symbols.

    Raises:
        ValueError: the lengths are not those of a complete code, or the stream does not have exactly `count` symbols.
    """
    _check(lengths)
    if not 0 <= count <= 8 * len(stream):
        raise ValueError(f"{len(stream):,} bytes cannot hold {count:,} symbols")
    order = numpy.lexsort((numpy.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    first, offset = _firsts(lengths)
    table = _table(lengths)
    symbols = numpy.empty(count, dtype=numpy.uint16)
    padded = numpy.concatenate([stream, numpy.zeros(8, dtype=numpy.uint8)])
    used = _read(padded, 8 * len(stream), order, first, offset, table, int(lengths.max(initial=0)), symbols)
    if used < 0 or len(stream) != -(-used // 8) or (used % 8 and int(stream[-1]) & (0xFF >> used % 8)):
        raise ValueError(f"the stream of {len(stream):,} bytes does not end after {count:,} symbols")
    return symbols


def _check(lengths: numpy.ndarray) -> None:
    """Raise a ValueError unless the code is complete: each bit pattern begins with one code. A lone symbol's is 0."""
    present = lengths[lengths > 0].astype(numpy.int64)
    if len(lengths) > LARGEST_ALPHABET or (len(present) and present.max() > LONGEST):
        raise ValueError(f"no code of ours has {len(lengths):,} symbols or {present.max(initial=0)} bits")
    share = sum(1 << (LONGEST - int(length)) for length in present)
    if share != 1 << LONGEST and present.tolist() not in ([], [1]):
        raise ValueError("the code lengths are not those of a complete prefix code")


def _firsts(lengths: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """For each length, the first code, and the index of its symbol in canonical order, with a final sentinel."""
    counts = numpy.bincount(lengths, minlength=LONGEST + 2)
    counts[0] = 0
    first, offset = numpy.zeros(LONGEST + 2, dtype=numpy.int64), numpy.zeros(LONGEST + 2, dtype=numpy.int64)
    for length in range(1, LONGEST + 2):
        first[length] = (first[length - 1] + counts[length - 1]) << 1 if length <= LONGEST else 0
        offset[length] = offset[length - 1] + counts[length - 1]
    return first, offset


def _table(lengths: numpy.ndarray) -> numpy.ndarray:
    """[2^12] lookup table by the next 12 bits: 64 * symbol + length of the first code, or -1 if longer or invalid."""
    table = numpy.full(1 << _TABLE_BITS, -1, dtype=numpy.int64)
    codes = canonical(lengths)
    for symbol in numpy.flatnonzero((lengths > 0) & (lengths <= _TABLE_BITS)):
        length = int(lengths[symbol])
        begin = int(codes[symbol]) << (_TABLE_BITS - length)
        table[begin:begin + (1 << (_TABLE_BITS - length))] = 64 * symbol + length
    return table


@_compiled
def _write(symbols, codes, lengths, stream):
    position, held, bits = 0, numpy.uint64(0), 0
    for symbol in symbols:
        length = lengths[symbol]
        held = (held << numpy.uint64(length)) | codes[symbol]  # at most 7 bits are carried over
        bits += length
        while bits >= 8:
            bits -= 8
            stream[position] = (held >> numpy.uint64(bits)) & numpy.uint64(0xFF)
            position += 1
        held &= (numpy.uint64(1) << numpy.uint64(bits)) - numpy.uint64(1)
    if bits:
        stream[position] = (held << numpy.uint64(8 - bits)) & numpy.uint64(0xFF)


@_compiled
def _read(stream, total, order, first, offset, table, longest, symbols):
    """Fill `symbols` and return the number of bits read; -1 on an invalid code or the end of the stream."""
    position = 0
    for index in range(symbols.size):
        byte = position >> 3
        if position >= total:
            return -1
        window = numpy.uint64(0)
        for ahead in range(8):
            window = (window << numpy.uint64(8)) | numpy.uint64(stream[byte + ahead])
        window <<= numpy.uint64(position & 7)
        found = table[window >> numpy.uint64(64 - _TABLE_BITS)]
        if found >= 0:
            symbols[index] = found >> 6
            position += found & 63
            continue
        for length in range(_TABLE_BITS + 1, longest + 1):
            rank = numpy.int64(window >> numpy.uint64(64 - length)) - first[length]
            if 0 <= rank < offset[length + 1] - offset[length]:
                symbols[index] = order[offset[length] + rank]
                position += length
                break
        else:
            return -1
    return position if position <= total else -1


# ---- blocks of symbols

@dataclass(frozen=True)
class Stream:
    """Encoded symbols.

    Attributes:
        bits: the concatenated codes, uint8.
        lengths: [levels ** block] code lengths, uint8.
        levels: size of the alphabet; symbols are 0 to levels - 1.
        block: number of symbols that share a code.
        count: number of symbols; the last block is padded with zeros.
    """

    bits: numpy.ndarray
    lengths: numpy.ndarray
    levels: int
    block: int
    count: int


def entropy_bits(symbols: numpy.ndarray) -> float:
    """The total entropy in bits, a lower bound for any code of single symbols (Shannon 1948)."""
    counts = numpy.bincount(symbols.ravel())
    counts = counts[counts > 0]
    return float((counts * numpy.log2(counts.sum() / counts)).sum())


def compress(symbols: numpy.ndarray, levels: int) -> Stream:
    """Encode symbols with the block size that takes the fewest bytes, including code lengths.

    A code of single symbols takes at least one bit for each, and up to a few percent more than the entropy; a code of
    blocks of n symbols has an n-th of that excess.
    """
    best: tuple[int, int, numpy.ndarray] | None = None
    for block in range(1, _most_symbols(levels) + 1):
        joined = _joined(symbols, levels, block)
        counts = numpy.bincount(joined, minlength=levels**block)
        lengths = code_lengths(counts)
        size = -(-int((counts * lengths).sum()) // 8) + len(lengths)
        if best is None or size < best[0]:
            best = size, block, lengths
    size, block, lengths = best
    return Stream(encode(_joined(symbols, levels, block), lengths), lengths, levels, block, len(symbols))


def expand(stream: Stream) -> numpy.ndarray:
    """The symbols of a stream, uint16.

    Raises:
        ValueError: as in `decode`, or alphabet and block size do not match.
    """
    if stream.levels < 1 or not 1 <= stream.block <= _most_symbols(stream.levels):
        raise ValueError(f"no stream of ours has {stream.levels} levels in blocks of {stream.block}")
    if len(stream.lengths) != stream.levels**stream.block or stream.count < 0:
        raise ValueError(f"{len(stream.lengths):,} code lengths are not of {stream.levels} levels in blocks of "
                         f"{stream.block}")
    joined = decode(stream.bits, stream.lengths, -(-stream.count // stream.block))
    if stream.block == 1:
        return joined
    powers = stream.levels ** numpy.arange(stream.block - 1, -1, -1)
    digits = _digits(numpy.arange(stream.levels**stream.block), powers, stream.levels)
    return digits[joined].reshape(-1)[:stream.count]


def _most_symbols(levels: int) -> int:
    """The largest block size for an alphabet."""
    block = 1
    while block < 12 and max(2, levels) ** (block + 1) <= LARGEST_ALPHABET:
        block += 1
    return block


def _joined(symbols: numpy.ndarray, levels: int, block: int) -> numpy.ndarray:
    """Join each block of symbols into one number, whose digits in base `levels` they are, highest first."""
    if block == 1:
        return symbols.astype(numpy.int64)
    padded = numpy.concatenate([symbols, numpy.zeros(-len(symbols) % block, dtype=symbols.dtype)])
    joined = numpy.zeros(len(padded) // block, dtype=numpy.int64)
    for column in padded.reshape(-1, block).T:
        joined *= levels
        joined += column
    return joined


def _digits(numbers: numpy.ndarray, powers: numpy.ndarray, levels: int) -> numpy.ndarray:
    return (numbers[:, None] // powers % levels).astype(numpy.uint16)
