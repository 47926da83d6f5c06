"""Archives of shared weights: clusters, codes and positions against their definitions, and files that lie."""

import hashlib
import heapq
import json
import math
import tracemalloc
import zlib

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save
from scipy.cluster.vq import kmeans2
from torch import nn

from strategies.export.archive.archive_file import FORMAT, read_archive, write_archive
from strategies.export.archive.clustering import cluster, positions, relative_positions
from strategies.export.archive.huffman import (
    Stream,
    canonical,
    code_lengths,
    compress,
    decode,
    encode,
    entropy_bits,
    expand,
)
from strategies.quantization.freeze import freeze_quantized
from strategies.quantization.qat import prepare
from strategies.quantization.quantizer import WeightQuantizer
from tests.strategies.export.hf.test_transformers_folder import build, prepared, schemes


def weights(rows: int = 400, columns: int = 300, kept: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network whose first layer has so many weights, of which a share is not zero."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows), nn.ReLU(), nn.Linear(rows, 3))
    with torch.no_grad():
        model[0].weight.normal_(generator=generator)
        largest = model[0].weight.abs().flatten().kthvalue(max(1, round((1 - kept) * rows * columns))).values
        if kept < 1:
            model[0].weight.mul_(model[0].weight.abs() > largest)
    return model.to(dtype)


# ---- Huffman codes

@settings(max_examples=80, deadline=None)
@given(some.lists(some.integers(0, 10**6), min_size=1, max_size=40), some.integers(0, 300), some.integers(0, 10**6))
def test_codes_are_prefix_free_cheapest_and_decode(counts, length, seed):
    counts = numpy.array(counts)
    lengths, codes = code_lengths(counts), canonical(code_lengths(counts))
    present = numpy.flatnonzero(counts)
    assert (lengths > 0).nonzero()[0].tolist() == present.tolist()
    if not len(present):
        return
    texts = [format(codes[symbol], "b").zfill(lengths[symbol]) for symbol in present]
    assert not any(one != two and two.startswith(one) for one in texts for two in texts)
    heap, total = counts[present].tolist(), 0
    heapq.heapify(heap)
    while len(heap) > 1:  # the cost of a code is the sum of all its inner nodes
        total += (both := heapq.heappop(heap) + heapq.heappop(heap))
        heapq.heappush(heap, both)
    assert (counts * lengths).sum() == (total if len(present) > 1 else counts.sum())
    symbols = numpy.random.default_rng(seed).choice(present, length)
    stream = encode(symbols, lengths)
    written = "".join(format(codes[symbol], "b").zfill(lengths[symbol]) for symbol in symbols)
    assert "".join(format(byte, "08b") for byte in stream) == written + "0" * (-len(written) % 8)
    assert decode(stream, lengths, length).tolist() == symbols.tolist()


def test_codes_longer_than_the_table_decode():
    counts = numpy.array([1, 1, *(int(1.7**number) for number in range(2, 40))])
    lengths = code_lengths(counts)
    assert lengths.max() > 30
    symbols = numpy.random.default_rng(0).integers(0, len(counts), 3000)
    assert decode(encode(symbols, lengths), lengths, 3000).tolist() == symbols.tolist()


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 20), some.integers(0, 500), some.integers(0, 10**6), some.floats(0.1, 8))
def test_streams_expand_to_what_was_compressed(levels, count, seed, skew):
    symbols = (levels * numpy.random.default_rng(seed).random(count) ** skew).astype(numpy.uint16)
    stream = compress(symbols, levels)
    assert expand(stream).tolist() == symbols.tolist()


@pytest.mark.parametrize(("levels", "skew"), [(1, 1), (2, 0.5), (2, 6), (3, 3), (4, 2), (16, 2), (32, 1), (256, 4)])
def test_streams_are_within_a_hundredth_of_the_entropy(levels, skew):
    symbols = (levels * numpy.random.default_rng(0).random(120_000) ** skew).astype(numpy.uint16)
    stream, least = compress(symbols, levels), entropy_bits(symbols) / 8
    probabilities = numpy.bincount(symbols) / len(symbols)
    assert least == pytest.approx(len(symbols) / 8 * -sum(p * math.log2(p) for p in probabilities if p))
    assert len(stream.bits) <= 1.01 * least + 1250 * (levels == 1), "a lone value takes a twelfth of a bit"


@settings(max_examples=200, deadline=None)
@given(some.binary(max_size=40), some.lists(some.integers(0, 255), max_size=20), some.integers(-1, 10**15))
def test_no_stream_crashes_the_decoder(bits, lengths, count):
    bits, lengths = numpy.frombuffer(bits, dtype=numpy.uint8), numpy.array(lengths, dtype=numpy.uint8)
    try:
        assert len(decode(bits, lengths, count)) == count <= 8 * len(bits)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(("stream", "message"), [
    (Stream(numpy.zeros(1, numpy.uint8), numpy.ones(2, numpy.uint8), 2, 1, 9), "1 bytes cannot hold 9 symbols"),
    (Stream(numpy.zeros(2, numpy.uint8), numpy.ones(2, numpy.uint8), 2, 1, 8), "does not end after 8 symbols"),
    (Stream(numpy.ones(1, numpy.uint8), numpy.ones(2, numpy.uint8), 2, 1, 7), "does not end after 7 symbols"),
    (Stream(numpy.full(1, 255, numpy.uint8), numpy.ones(1, numpy.uint8), 1, 1, 8), "does not end after 8 symbols"),
    (Stream(numpy.zeros(1, numpy.uint8), numpy.array([1, 2], numpy.uint8), 2, 1, 8), "not those of a complete prefix"),
    (Stream(numpy.zeros(1, numpy.uint8), numpy.ones(3, numpy.uint8), 3, 1, 8), "not those of a complete prefix"),
    (Stream(numpy.zeros(1, numpy.uint8), numpy.ones(2, numpy.uint8), 10**15, 1, 8), "are not of 10{15} levels"),
    (Stream(numpy.zeros(1, numpy.uint8), numpy.ones(2, numpy.uint8), 2, 60, 8), "2 levels in blocks of 60"),
])
def test_streams_that_are_none_are_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        expand(stream)


# ---- clusters and positions

@pytest.mark.parametrize("levels", [2, 4, 16])
def test_clusters_are_those_of_scipys_k_means(levels):
    values = numpy.random.default_rng(levels).normal(size=3000) ** 3
    centroids, index = cluster(values, levels)
    start = numpy.linspace(values.min(), values.max(), levels)
    with pytest.warns(UserWarning) if levels == 16 else numpy.errstate():  # scipy's of clusters that are empty
        theirs, places = kmeans2(values[:, None], start[:, None], iter=400, minit="matrix")
    assert numpy.allclose(centroids[index], theirs[places, 0])
    assert (numpy.abs(values[:, None] - centroids).argmin(1) == index).all()
    assert numpy.allclose(centroids, [values[index == place].mean() for place in range(len(centroids))])


def test_clusters_of_few_values_are_these():
    for values in ([3.0], [2.0, 2.0, 2.0], [1.0, 5.0, 1.0]):
        centroids, index = cluster(numpy.array(values), 8)
        assert centroids[index].tolist() == values and len(centroids) == len(set(values))


@settings(max_examples=80, deadline=None)
@given(some.integers(1, 600), some.sampled_from([2, 4, 32, 256]), some.floats(0, 1), some.integers(0, 10**6))
def test_positions_are_found_again(total, span, share, seed):
    numbers = numpy.random.default_rng(seed)
    kept = numpy.flatnonzero(numbers.random(total) < share)
    if not len(kept):
        kept = numbers.integers(0, total, 1)
    gaps = relative_positions(kept, total, span)
    assert gaps.max() < span and positions(gaps, total, span).tolist() == kept.tolist()
    for wrong in (int(kept[-1]), total + span):
        with pytest.raises(ValueError, match="positions of weights end at"):
            positions(gaps, wrong, span)


# ---- archives

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "kept"), [(1, 1.0), (5, 1.0), (4, 0.7), (5, 0.08), (8, 0.04)])
def test_what_is_read_is_the_clustering_and_zeros_stay_zero(tmp_path, bits, kept, dtype):
    model = weights(kept=kept, dtype=dtype)
    report = write_archive(tmp_path / "model.lmb", model, bits)
    found, state = read_archive(tmp_path / "model.lmb"), model.state_dict()
    assert list(found) != [] and set(found) == set(state)
    weight = state["0.weight"].float().numpy().ravel()
    centroids, index = cluster(weight[weight != 0], 2**bits)
    expected = torch.zeros(weight.shape, dtype=dtype)
    expected[torch.from_numpy(weight != 0)] = torch.from_numpy(centroids).to(dtype)[torch.from_numpy(index).int()]
    assert torch.equal(found["0.weight"], expected.view(400, 300)) and found["0.weight"].dtype is dtype
    assert torch.equal(found["0.bias"], state["0.bias"]) and torch.equal(found["2.bias"], state["2.bias"])
    model.load_state_dict(found)
    file = (tmp_path / "model.lmb").stat().st_size
    assert file == report.bytes and report.dense_bytes == sum(t.nbytes for t in state.values())
    assert report.bytes <= 1.01 * report.entropy_bytes + report.header_bytes
    assert report.header_bytes < 2000 + 4096 * 2


def test_few_weights_far_from_all_others_take_little_more_than_their_entropy(tmp_path):
    """k-means from the extremes then puts nearly all weights into one cluster: not zeros, and left out all the same."""
    model = nn.Sequential(nn.Linear(1000, 300, bias=False))
    with torch.no_grad():
        model[0].weight.uniform_(0.9, 1.1).flatten()[::997] = -50
    report = write_archive(tmp_path / "model.lmb", model, 1)
    found = read_archive(tmp_path / "model.lmb")["0.weight"].flatten()
    assert len(found[::997].unique()) == 1 and len(found.unique()) == 2 and found[::997][0] == -50
    assert report.bytes - report.header_bytes < 1.3 * report.entropy_bytes < 700


def test_an_archive_is_smaller_than_zlib_makes_the_same_places(tmp_path):
    for kept in (1.0, 0.1):
        model = weights(kept=kept)
        with torch.no_grad():
            model[2].weight.zero_()
        report = write_archive(tmp_path / "model.lmb", model, 4)
        weight = model[0].weight.detach().numpy().ravel()
        index = numpy.zeros(weight.shape, numpy.uint8)
        index[weight != 0] = cluster(weight[weight != 0], 16)[1] + 1
        bits = numpy.unpackbits(index[:, None], axis=1)[:, 3:]  # places of 5 bits, packed
        theirs = min(len(zlib.compress(index.tobytes(), 9)), len(zlib.compress(numpy.packbits(bits).tobytes(), 9)))
        assert report.bytes < 0.95 * theirs, kept


def test_rules_ties_and_tensors_that_are_left_alone(tmp_path):
    model = build("llama", tied=True)
    write_archive(tmp_path / "model.lmb", model, 4, rules=[("*.down_proj.weight", 2), ("*.q_proj.*", None)],
                  ignore=("*.k_proj.weight",))
    found, state = read_archive(tmp_path / "model.lmb"), model.state_dict()
    assert set(found) == set(state) and found["lm_head.weight"] is found["model.embed_tokens.weight"]
    for name, tensor in found.items():
        distinct = len(tensor.unique())
        if "down_proj" in name:
            assert distinct <= 4, name
        elif any(part in name for part in ("q_proj", "k_proj", "norm")):
            assert torch.equal(tensor, state[name]), name
        else:
            assert distinct <= 16 < len(state[name].unique()), name


@pytest.mark.parametrize("name", ["8 bits, tensor, affine", "4 bits, 32", "3 bits, None, affine", "2 bits, 32, affine",
                                  "ternary, learned", "binary, absmean", "fp8, mse", "ternary, tensor", "embedding",
                                  "tied", "mixed", "head"])
def test_quantized_layers_keep_their_own_numbers(tmp_path, name):
    model = prepared(name, schemes()[name], torch.float32)
    write_archive(tmp_path / "model.lmb", model, 8)
    found = read_archive(tmp_path / "model.lmb")
    layers = {f"{layer}.weight" for layer, module in model.named_modules() if hasattr(module, "quantizer")}
    state = freeze_quantized(model, torch.float32).state_dict()
    assert layers and set(found) == set(state)
    for layer in layers:
        assert torch.equal(found[layer], state[layer]), layer


def test_a_ternary_student_takes_less_than_its_two_bits(tmp_path):
    model = weights()
    prepare(model, WeightQuantizer(kind="ternary"))
    report = write_archive(tmp_path / "model.lmb", model)
    assert report.bytes - report.header_bytes < 1.65 * 400 * 300 / 8 + 4 * 806 + 4 * 403
    assert report.bytes <= 1.01 * report.entropy_bytes + report.header_bytes


def test_an_archive_is_a_safetensors_file_like_others(tmp_path):
    write_archive(tmp_path / "model.lmb", weights(kept=0.1), 4)
    tensors = load_file(tmp_path / "model.lmb")
    assert {"codebook/0.weight", "index/0.weight", "gap/0.weight", "raw/0.bias"} <= set(tensors)


@pytest.mark.parametrize(("how", "message"), [
    ({"bits": 0}, "1 to 8 bits, not 0"), ({"rules": [("0.weight", 9)]}, "1 to 8 bits, not 9"),
    ({"ignore": ("attention.*",)}, r"'attention\.\*' in `ignore` or `rules` matches no tensor; names look like"),
])
def test_what_cannot_be_written_is_said(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        write_archive(tmp_path / "model.lmb", weights(), **how)
    model = weights()
    model[0].weight.data[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"0\.weight: a weight is not finite"):
        write_archive(tmp_path / "model.lmb", model)
    assert not list(tmp_path.iterdir())


# ---- files that lie

def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    file = tmp_path / "model.lmb"
    write_archive(file, weights(20, 30, kept=0.3), 3)
    data = file.read_bytes()
    for length in [*range(0, len(data), 41), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cannot be read as an archive: .*cut short"):
            read_archive(file)
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:])
        with pytest.raises(ValueError, match="cannot be read as an archive"):
            read_archive(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="its checksum is wrong"):
        read_archive(file)


def forged(tensors: dict, coded: object, same: object = None, form: str = FORMAT) -> bytes:
    """A file whose checksum is right, whatever it says."""
    data = save(tensors, {"format": form, "coded": coded if isinstance(coded, str) else json.dumps(coded),
                          "same": json.dumps(same or {}), "sha256": "0" * 64})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def parts(count: int = 8, **changes) -> dict:
    own = {"codebook": torch.tensor([0.0, 1.0]), "index": torch.zeros(-(-count // 8), dtype=torch.uint8),
           "index_lengths": torch.ones(2, dtype=torch.uint8)}
    return {f"{name}/w": tensor for name, tensor in {**own, **changes}.items()}


def entry(shape=(8,), dtype="float32", levels=2, block=1, count=8, **more) -> dict:
    index = {"levels": levels, "block": block, "count": count}
    return {"w": {"shape": list(shape), "dtype": dtype, "index": index, **more}}


GAP = {"gap": torch.full((1,), 255, dtype=torch.uint8), "gap_lengths": torch.ones(2, dtype=torch.uint8)}


@pytest.mark.parametrize(("data", "message"), [
    (forged(parts(), entry((10**6, 10**6, 4))), "its tensors would take 16,000,000,000,.* more than `most_bytes`"),
    (forged(parts(), entry((10**9,))), "8 weights of .* do not fill the shape"),
    (forged(parts(), entry((10**9,), count=10**9)), "1 bytes cannot hold 1,000,000,000 symbols"),
    (forged(parts(), entry(count=2**80)), "cannot hold"),
    (forged(parts(), entry(count=-1)), "is no whole number"), (forged(parts(), entry(count="8")), "is no whole number"),
    (forged(parts(), entry((-8,))), "is no whole number"), (forged(parts(), entry((True, 8))), "is no whole number"),
    (forged(parts(), entry(levels=2**70)), "code lengths are not of"), (forged(parts(), entry(levels=0)), "0 levels"),
    (forged(parts(codebook=torch.zeros(2, 4000)), entry()), "do not fill the shape"),
    (forged(parts(codebook=torch.zeros(3)), entry()), "do not fill the shape"),
    (forged(parts(index=torch.zeros(2)), entry()), "a stream is not of bytes"),
    (forged(parts(scale=torch.zeros(1, 3)), entry()), "shape"),
    (forged(parts(scale=torch.ones(1, 1), zero_point=torch.zeros(1, 1, 1000)), entry()), "differ"),
    (forged(parts(**GAP), entry((10**9,), gap={"levels": 2, "block": 1, "count": 8})), "positions of weights end at 8"),
    (forged(parts(**GAP), entry(gap={"levels": 1, "block": 1, "count": 8})), "code lengths are not of"),
    (forged(parts(), {"w": 5}), "int"), (forged(parts(), [1]), "list"), (forged(parts(), "[" * 10**5), "recursion"),
    (forged(parts(), entry(dtype="object")), "'object' is missing"),
    (forged(parts(), entry(), {"v": "u"}), "'u' is missing"), (forged({}, entry()), "'codebook' is missing"),
    (forged(parts(), entry(), form="zip"), "its format is 'zip'"),
    (b"", "no archive"), (b"\xff" * 100, "no archive"), (b"PK\x03\x04" * 50, "no archive"),
])
def test_a_hostile_file_is_refused_before_it_takes_memory(tmp_path, data, message):
    (tmp_path / "model.lmb").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path / "model.lmb")
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_most_bytes_is_the_readers_to_choose(tmp_path):
    write_archive(tmp_path / "model.lmb", weights(), 4)
    with pytest.raises(ValueError, match="more than `most_bytes`, 1,000"):
        read_archive(tmp_path / "model.lmb", most_bytes=1000)
