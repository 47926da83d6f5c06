"""The cache of a teacher's targets: exact, resumed after a kill at any moment, and never silently wrong."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from strategies.distillation.teacher_cache.cache_reader import (
    CacheDamaged,
    CacheInUse,
    CacheMismatch,
    CacheUnfinished,
    Identity,
    TargetCache,
    TargetWriter,
    bytes_per_token,
    total_bytes,
)
from strategies.distillation.teacher_cache.sampling import draw_samples, top_k

COMMON = {"rows": 23, "sequence_length": 12, "teacher": "t", "tokenizer": "k", "data": "d"}
HIDDEN = Identity("hidden", dtype="bfloat16", width=16, **COMMON)
SAMPLES = Identity("samples", vocabulary=300, draws=20, temperature=1.5, **COMMON)
TOP = Identity("top_k", vocabulary=300, k=5, temperature=2.0, **COMMON)
KINDS = pytest.mark.parametrize("identity", [HIDDEN, SAMPLES, TOP], ids=lambda one: one.kind)


def loss_mask(identity: Identity, row: int) -> int:
    """Learned positions of a row: none in every fifth one, all in some."""
    return 0 if row % 5 == 1 else 1 + row * 7 % identity.sequence_length


def content_of(identity: Identity, rows: list[int]) -> dict[str, torch.Tensor]:
    """What a teacher says of these rows, a function of the row's number alone."""
    made, tokens = [], [loss_mask(identity, row) for row in rows]
    for row, count in zip(rows, tokens, strict=True):
        generator = torch.Generator().manual_seed(row)
        width = identity.width or identity.vocabulary
        values = 3 * torch.randn(count, width, generator=generator)
        numbers = row * identity.sequence_length + torch.arange(count)
        made.append({"hidden": values.to(getattr(torch, identity.dtype))} if identity.kind == "hidden" else
                    draw_samples(values, identity.draws, identity.temperature, 0, numbers) if identity.kind == "samples"
                    else top_k(values, identity.k, identity.temperature))
    return {"tokens": torch.tensor(tokens), **{name: torch.cat([one[name] for one in made]) for name in made[0]}}


def write(folder: Path, identity: Identity, rows_per_shard: int | None = 4, batch: int = 1) -> None:
    with TargetWriter(folder, identity, rows_per_shard=rows_per_shard) as writer:
        rows = list(writer.rows_left())
        for start in range(0, len(rows), batch):
            writer.add(rows[start:start + batch], content_of(identity, rows[start:start + batch]))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values), name


@KINDS
def test_rows_come_back_exactly_in_any_order(identity, tmp_path):
    write(tmp_path, identity)
    cache = TargetCache(tmp_path, identity)
    for rows in ([0], [22, 3, 3, 0, 11], [1], [1, 6], list(range(23)), random.Random(0).sample(range(23), 23)):
        assert_same(cache.read(rows), content_of(identity, rows))
    assert cache.tokens == sum(loss_mask(identity, row) for row in range(23))


@KINDS
@pytest.mark.parametrize("rows_per_shard", [1, 5, 23, 100, None])
def test_batches_and_shards_of_any_size_hold_the_same(identity, rows_per_shard, tmp_path):
    write(tmp_path, identity, rows_per_shard, batch=6)
    size = 23 if rows_per_shard is None else rows_per_shard
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-23 // size)
    assert_same(TargetCache(tmp_path, identity).read(range(23)), content_of(identity, list(range(23))))


def test_the_tests_rows_differ_in_their_learned_positions():
    counts = {loss_mask(HIDDEN, row) for row in range(23)}
    assert {0, 1, 12} <= counts, "a row without any, and one with all"


@KINDS
def test_rows_without_learned_positions_make_a_cache(identity, tmp_path):
    identity = replace(identity, rows=2)
    empty = {name: values[:0] for name, values in content_of(identity, [0]).items()}
    empty["tokens"] = torch.zeros(2, dtype=torch.long)
    with TargetWriter(tmp_path, identity) as writer:
        writer.add([0, 1], empty)
    assert_same(TargetCache(tmp_path, identity).read([1, 0]), empty)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hidden_states_keep_every_bit(dtype, tmp_path):
    identity = replace(HIDDEN, rows=2, dtype=dtype, width=3, sequence_length=2)
    hidden = torch.tensor([[1e-7, -0.0, 65504.0], [3e-5, 1 / 3, -2.0]]).to(getattr(torch, dtype))
    with TargetWriter(tmp_path, identity) as writer:
        writer.add([0], {"tokens": torch.tensor([2]), "hidden": hidden})
        hidden.zero_()  # the caller's buffer is its own again
        writer.add([1], {"tokens": torch.tensor([0]), "hidden": hidden[:0]})
    found = TargetCache(tmp_path, identity).read([0])["hidden"]
    assert found.signbit()[0, 1]
    assert torch.equal(found, torch.tensor([[1e-7, -0.0, 65504.0], [3e-5, 1 / 3, -2.0]]).to(getattr(torch, dtype)))


def test_log_probabilities_may_be_halved_and_the_tail_stays_whole(tmp_path):
    identity = replace(TOP, dtype="float16")
    write(tmp_path, identity)
    found, exact = TargetCache(tmp_path, identity).read(range(23)), content_of(identity, list(range(23)))
    assert torch.equal(found["log_p"], exact["log_p"].half()) and torch.equal(found["log_tail"], exact["log_tail"])


@pytest.mark.parametrize(("vocabulary", "size"), [
    (256, 1), (257, 2), (65_536, 2), (65_537, 3), (2**24, 3), (2**24 + 1, 4)])
def test_token_ids_take_as_few_bytes_as_hold_them(vocabulary, size, tmp_path):
    identity = replace(TOP, rows=1, sequence_length=1, vocabulary=vocabulary, k=2)
    assert bytes_per_token(identity) == 2 * size + 2 * 4 + 4
    content = {"tokens": torch.tensor([1]), "ids": torch.tensor([[vocabulary - 1, 0]]), "log_p": torch.zeros(1, 2),
               "log_tail": torch.zeros(1)}
    with TargetWriter(tmp_path, identity) as writer:
        writer.add([0], content)
    assert_same(TargetCache(tmp_path, identity).read([0]), content)


@pytest.mark.parametrize("draws", [255, 256, 70_000])
def test_counts_of_many_draws_come_back(draws, tmp_path):
    identity = replace(SAMPLES, rows=1, draws=draws, vocabulary=3)
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 5, -torch.inf]])
    drawn = draw_samples(logits, draws, 1.0, 0, torch.arange(2))
    with TargetWriter(tmp_path, identity) as writer:
        writer.add([0], {"tokens": torch.tensor([2]), **drawn})
    assert_same(TargetCache(tmp_path, identity).read([0]), {"tokens": torch.tensor([2]), **drawn})
    assert drawn["counts"][-1] == draws


@pytest.mark.parametrize("identity", [
    replace(HIDDEN, rows=64, width=256), replace(TOP, rows=64, k=50), replace(SAMPLES, rows=64, draws=200)],
    ids=lambda one: one.kind)
def test_the_bytes_stated_before_are_those_on_disk(identity, tmp_path):
    write(tmp_path, identity, rows_per_shard=32, batch=64)
    there = sum(file.stat().st_size for file in tmp_path.iterdir())
    tokens = sum(loss_mask(identity, row) for row in range(64))
    distinct = None
    if identity.kind == "samples":
        assert there < total_bytes(identity, tokens)
        distinct = float(TargetCache(tmp_path, identity).read(range(64))["distinct"].double().mean())
        assert distinct < 120, "nothing was drawn twice"
    assert there == pytest.approx(total_bytes(identity, tokens, distinct), rel=0.02)
    assert there == pytest.approx(tokens * bytes_per_token(identity, distinct), rel=0.02)


@KINDS
def test_the_bytes_of_rows_without_learned_positions_are_counted(identity, tmp_path):
    identity = replace(identity, rows=2000)
    empty = {name: values[:0] for name, values in content_of(identity, [0]).items()}
    with TargetWriter(tmp_path, identity) as writer:
        writer.add(range(2000), {**empty, "tokens": torch.zeros(2000, dtype=torch.long)})
    there = (tmp_path / "shard-00000.safetensors").stat().st_size
    assert 0 < there - total_bytes(identity, 0) < 512


def test_bytes_for_each_kind_are_the_sum_of_what_is_kept():
    assert bytes_per_token(replace(HIDDEN, width=100)) == 200
    assert bytes_per_token(replace(TOP, vocabulary=150_000, k=64)) == 64 * (3 + 4) + 4
    assert bytes_per_token(replace(TOP, vocabulary=150_000, k=64, dtype="float16")) == 64 * (3 + 2) + 4
    assert bytes_per_token(replace(TOP, vocabulary=50, k=64)) == 50 * (1 + 4) + 4
    assert bytes_per_token(replace(SAMPLES, vocabulary=150_000, draws=50)) == 50 * (3 + 1 + 4) + 1
    assert bytes_per_token(replace(SAMPLES, vocabulary=150_000, draws=50), distinct=12.5) == 12.5 * (3 + 1 + 4) + 1
    assert bytes_per_token(replace(SAMPLES, vocabulary=100, draws=300)) == 100 * (1 + 2 + 4) + 1


def test_more_tokens_than_there_are_make_a_cache_of_all(tmp_path):
    identity = replace(TOP, vocabulary=3)
    write(tmp_path, identity)
    found = TargetCache(tmp_path, identity).read(range(23))
    assert_same(found, content_of(identity, list(range(23))))
    assert found["ids"].shape[-1] == 3 and (found["log_tail"] == -torch.inf).all()


class Interrupted(Exception):
    pass


@KINDS
def test_writing_goes_on_where_it_was_interrupted(identity, tmp_path):
    write(tmp_path / "whole", identity)
    with pytest.raises(Interrupted), TargetWriter(tmp_path / "cut", identity, rows_per_shard=4) as writer:
        writer.add(range(10), content_of(identity, list(range(10))))
        raise Interrupted
    with pytest.raises(CacheUnfinished, match="8 of 23 rows are there; start the writing again, it goes on from there"):
        TargetCache(tmp_path / "cut", identity)
    with TargetWriter(tmp_path / "cut", identity, rows_per_shard=7) as writer:  # it goes on by its own size
        assert writer.next_row == 8 and list(writer.rows_left()) == list(range(8, 23))
        writer.add([8], content_of(identity, [8]))
        assert writer.next_row == 9 and list(writer.rows_left()) == list(range(9, 23))
    write(tmp_path / "cut", identity)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with TargetWriter(tmp_path / "cut", identity) as writer:
        assert writer.next_row is None and not list(writer.rows_left())


@KINDS
def test_writers_killed_at_any_moment_leave_what_an_undisturbed_one_writes(identity, tmp_path):
    """Real processes, SIGKILL. What is recorded after each kill is served; the end is equal byte for byte."""
    identity = replace(identity, rows=60)
    began = time.monotonic()
    write(tmp_path / "whole", identity, rows_per_shard=2)
    span, moments = time.monotonic() - began, random.Random(0)
    fork, rows_seen, folder = multiprocessing.get_context("fork"), [], tmp_path / "cut"
    for _ in range(15):
        process = fork.Process(target=write, args=(folder, identity, 2))
        process.start()
        time.sleep(moments.uniform(0, span / 4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        rows_seen.append(rows_recorded(folder))
        if rows_seen[-1] < 60:
            with pytest.raises(CacheUnfinished, match=f"{rows_seen[-1]} of 60 rows"):
                TargetCache(folder, identity)
    assert rows_seen == sorted(rows_seen), "a kill lost what was recorded"
    write(folder, identity, rows_per_shard=2)
    assert files(folder) == files(tmp_path / "whole")
    assert_same(TargetCache(folder, identity).read(range(60)), content_of(identity, list(range(60))))


def test_what_a_killed_writer_may_leave_is_not_in_the_way(tmp_path):
    """A shard cut while it was written, one in its place that is not yet recorded, and a library's own file."""
    write(tmp_path / "whole", HIDDEN)
    with TargetWriter(tmp_path / "cut", HIDDEN, rows_per_shard=4) as writer:
        writer.add(range(8), content_of(HIDDEN, list(range(8))))
    (tmp_path / "cut" / "shard-00002.safetensors").write_bytes(b"half a shard")
    (tmp_path / "cut" / ".partial").mkdir()
    for name in ("shard-00002.safetensors", "manifest.json", ".tmpAbCdEf"):
        (tmp_path / "cut" / ".partial" / name).write_bytes(b"left")
    write(tmp_path / "cut", HIDDEN)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def rows_recorded(folder: Path) -> int:
    manifest = folder / "manifest.json"
    return sum(one["rows"] for one in json.loads(manifest.read_text())["shards"].values()) if manifest.exists() else 0


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with TargetWriter(tmp_path, HIDDEN), pytest.raises(CacheInUse, match="another process is writing the cache .*wait"):
        TargetWriter(tmp_path, HIDDEN)
    with pytest.raises(CacheMismatch):
        TargetWriter(tmp_path, SAMPLES)
    TargetWriter(tmp_path, HIDDEN).close()  # a refused writer holds nothing


@pytest.mark.parametrize(("field", "value"), [
    ("rows", 24), ("sequence_length", 13), ("teacher", "T"), ("tokenizer", "K"), ("data", "D"), ("dtype", "float16"),
    ("vocabulary", 301), ("k", 6), ("temperature", 2.5)])
def test_each_field_that_differs_is_named(field, value, tmp_path):
    write(tmp_path, TOP)
    other = replace(TOP, **{field: value})
    wanted = (f"the cache in {tmp_path} was made from something else: {field} is {getattr(TOP, field)!r} there and "
              f"{value!r} here. Give another folder, or remove this one to have it written again")
    for opened in (TargetCache, TargetWriter):
        with pytest.raises(CacheMismatch) as caught:
            opened(tmp_path, other)
        assert str(caught.value) == wanted and isinstance(caught.value, ValueError)
    assert TargetCache(tmp_path, TOP).read([0])["tokens"].tolist() == [1], "a refusal changed the cache"


def test_all_fields_that_differ_are_in_one_message(tmp_path):
    write(tmp_path, TOP)
    with pytest.raises(CacheMismatch, match="kind is 'top_k' there and 'samples' here; vocab.* k is 5 there and None"):
        TargetCache(tmp_path, replace(SAMPLES, vocabulary=301))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


DAMAGES = [(cut, r"has \d+ bytes instead of \d+"), (lengthen, r"has \d+ bytes instead of \d+"),
           (Path.unlink, "is missing"), (flip, "has the right size and another checksum")]


@KINDS
@pytest.mark.parametrize(("damage", "what"), DAMAGES, ids=["cut", "lengthened", "missing", "flipped"])
def test_a_damaged_shard_is_named_and_written_again_alone(identity, damage, what, tmp_path):
    write(tmp_path, identity)
    whole = files(tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    damage(shard)
    with pytest.raises(CacheDamaged, match=f"{re.escape(str(shard))} {what}; remove it and start the writing again: "
                                           "this shard alone will be written again"):
        TargetCache(tmp_path, identity).read([9])
    shard.unlink(missing_ok=True)
    with TargetWriter(tmp_path, identity) as writer:
        assert list(writer.rows_left()) == [8, 9, 10, 11]
    write(tmp_path, identity)
    assert files(tmp_path) == whole


def test_sizes_are_checked_at_once_and_checksums_when_a_shard_is_used(tmp_path):
    write(tmp_path, HIDDEN)
    flip(tmp_path / "shard-00003.safetensors")
    cache = TargetCache(tmp_path, HIDDEN)
    assert_same(cache.read([0, 4, 9]), content_of(HIDDEN, [0, 4, 9]))
    for use in (lambda: cache.read([0, 12]), cache.verify, lambda: cache.read([15])):
        with pytest.raises(CacheDamaged, match="shard-00003.safetensors has the right size and another checksum"):
            use()
    cut(tmp_path / "shard-00004.safetensors")
    with pytest.raises(CacheDamaged, match="shard-00004.safetensors has"):
        TargetCache(tmp_path, HIDDEN)
    (tmp_path / "shard-00005.safetensors").unlink()
    with pytest.raises(CacheDamaged, match="shard-00005.safetensors is missing"):
        cache.read([22])


def test_shards_in_each_others_place_are_found(tmp_path):
    identity = replace(HIDDEN, rows=4, sequence_length=5)
    with TargetWriter(tmp_path, identity, rows_per_shard=2) as writer:
        for row in range(4):
            hidden = torch.full((5, 16), float(row)).bfloat16()
            writer.add([row], {"tokens": torch.tensor([5]), "hidden": hidden})
    first, second = (tmp_path / f"shard-0000{number}.safetensors" for number in (0, 1))
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    with pytest.raises(CacheDamaged, match="shard-00000.safetensors has the right size and another checksum"):
        TargetCache(tmp_path, identity).read([0])


def test_a_writer_mends_several_shards_in_one_go(tmp_path):
    write(tmp_path, SAMPLES)
    whole = files(tmp_path)
    cut(tmp_path / "shard-00001.safetensors")
    (tmp_path / "shard-00004.safetensors").unlink()
    with TargetWriter(tmp_path, SAMPLES) as writer:
        assert list(writer.rows_left()) == [4, 5, 6, 7, 16, 17, 18, 19]
        writer.add([4, 5, 6, 7, 16], content_of(SAMPLES, [4, 5, 6, 7, 16]))
        assert writer.next_row == 17
        with pytest.raises(ValueError, match=r"rows \[8\] cannot be added, the next ones are \[17\]: go by"):
            writer.add([8], content_of(SAMPLES, [8]))
        writer.add([17, 18, 19], content_of(SAMPLES, [17, 18, 19]))
    assert files(tmp_path) == whole


def without(key):
    """Leave a key out of a manifest."""
    return lambda data: json.dumps({name: value for name, value in data.items() if name != key})


def shards_of(change):
    """Change the records of the shards in a manifest."""
    def changed(data):
        change(data["shards"])
        return json.dumps(data)
    return changed


@pytest.mark.parametrize(("broken", "what"), [
    (lambda data: json.dumps(data)[:200], "JSONDecodeError"), (lambda data: "", "JSONDecodeError"),
    (lambda data: "[1]", "TypeError"), (lambda data: "\udcff", "UnicodeDecodeError"),
    (without("identity"), "KeyError: 'identity'"), (without("rows_per_shard"), "KeyError: 'rows_per_shard'"),
    (without("shards"), "KeyError: 'shards'"), (lambda data: json.dumps({**data, "shards": None}), "AttributeError"),
    (lambda data: json.dumps({**data, "rows_per_shard": 0}), "rows_per_shard = 0"),
    (shards_of(lambda shards: shards["1"].pop("sha256")), "TypeError: .*sha256"),
    (shards_of(lambda shards: shards.update({"6": shards["1"]})), "shard 6 cannot have 4 rows"),
    (shards_of(lambda shards: shards.update({"-1": shards["1"]})), "shard -1 cannot have 4 rows"),
    (shards_of(lambda shards: shards.update({"5": shards["1"]})), "shard 5 cannot have 4 rows")])
def test_a_manifest_that_cannot_be_is_named_and_the_cache_written_again(broken, what, tmp_path):
    write(tmp_path, HIDDEN)
    whole, manifest = files(tmp_path), tmp_path / "manifest.json"
    manifest.write_text(broken(json.loads(manifest.read_text())), errors="surrogateescape")
    for opened in (TargetCache, TargetWriter):
        with pytest.raises(CacheDamaged, match=f"{re.escape(str(manifest))} is not the manifest of a cache .*{what}.*; "
                                               "remove it and start the writing again: the whole cache will be "):
            opened(tmp_path, HIDDEN)
    manifest.unlink()
    write(tmp_path, HIDDEN)
    assert files(tmp_path) == whole


def test_another_format_of_files_is_a_mismatch(tmp_path):
    write(tmp_path, HIDDEN)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheMismatch, match="format is 2 there and 1 here"):
        TargetCache(tmp_path, HIDDEN)


def test_a_folder_without_a_cache_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CacheUnfinished, match=f"no cache in {folder} .no manifest.json.: 0 of 23 rows are there"):
            TargetCache(folder, HIDDEN)


def test_a_cache_that_the_disk_cannot_hold_is_refused_with_both_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    identity = replace(HIDDEN, sequence_length=10**9, width=10**6)
    with pytest.raises(ValueError, match=r"needs another \d+ bytes, and its disk has \d+ free: give a f") as caught:
        TargetWriter(tmp_path, identity)
    needed, said = map(int, re.findall(r"\d{6,}", str(caught.value).split("needs another")[1]))
    assert needed == total_bytes(identity, 23 * 10**9)
    assert said == pytest.approx(free, rel=0.5) and not list(tmp_path.glob("manifest*"))
    with pytest.raises(ValueError, match="needs another 4611686018427387904 bytes"):
        TargetWriter(tmp_path, HIDDEN, stated=2**62)
    TargetWriter(tmp_path, identity, stated=1000).close()


def test_only_rows_still_to_be_written_need_space(tmp_path):
    write(tmp_path, HIDDEN)
    TargetWriter(tmp_path, HIDDEN, stated=2**62).close()
    (tmp_path / "shard-00005.safetensors").unlink()  # three rows of 23
    with pytest.raises(ValueError, match=f"needs another {2**62 - 2**62 * 20 // 23} bytes"):
        TargetWriter(tmp_path, HIDDEN, stated=2**62)


class Rows(Dataset):
    def __init__(self, cache: TargetCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 23

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.cache.read([row])


def same_in_another_process(cache: TargetCache) -> bool:
    return all(torch.equal(values, content_of(SAMPLES, [7, 2])[name]) for name, values in cache.read([7, 2]).items())


def test_workers_read_the_cache_forked_or_pickled(tmp_path):
    write(tmp_path, SAMPLES)
    cache = TargetCache(tmp_path, SAMPLES)
    cache.read([0, 22])
    loader = DataLoader(Rows(cache), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for row, content in enumerate(loader):
        assert_same(content, content_of(SAMPLES, [row]))
    again = pickle.loads(pickle.dumps(cache))
    assert same_in_another_process(again) and same_in_another_process(cache)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(same_in_another_process, [cache] * 4))


def test_workers_of_a_verified_cache_do_not_check_it_again(tmp_path):
    """Each reading all of a large cache once more before its first row."""
    write(tmp_path, HIDDEN)
    cache = TargetCache(tmp_path, HIDDEN)
    cache.verify()
    flip(tmp_path / "shard-00000.safetensors")
    pickle.loads(pickle.dumps(cache)).read([0])
    with pytest.raises(CacheDamaged):
        TargetCache(tmp_path, HIDDEN).read([0])


def test_what_a_shard_holds_is_not_loaded_whole(tmp_path):
    """Resident memory after reading a row of 8 MiB, once mapped and once the caller's, of a shard of 64 MiB."""
    identity = replace(HIDDEN, rows=8, sequence_length=2**11, width=2**10, dtype="float32")
    with TargetWriter(tmp_path, identity, rows_per_shard=8) as writer:
        for row in range(8):
            writer.add([row], {"tokens": torch.tensor([2**11]), "hidden": torch.full((2**11, 2**10), float(row))})
    cache = TargetCache(tmp_path, identity)
    cache.verify()
    before = resident()
    hidden = cache.read([5])["hidden"]
    assert resident() - before < 32 * 2**20
    assert (hidden == 5).all()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_read_is_the_callers_own(tmp_path):
    write(tmp_path, HIDDEN)
    cache = TargetCache(tmp_path, HIDDEN)
    for rows in ([4], [4, 7]):
        cache.read(rows)["hidden"].zero_()
        assert_same(cache.read(rows), content_of(HIDDEN, rows))
    cache.verify()


@pytest.mark.parametrize("rows", [[], [23], [0, -1]])
def test_rows_that_are_not_there_are_named(rows, tmp_path):
    write(tmp_path, HIDDEN)
    with pytest.raises(ValueError, match=re.escape(f"rows = {rows}: one or more from 0 to 22 are expected")):
        TargetCache(tmp_path, HIDDEN).read(rows)


def wrong_content(identity, **changed):
    content = content_of(identity, [0, 2]) | changed
    return identity, {name: values for name, values in content.items() if values is not None}


FILL = torch.zeros(4)
WRONG = [
    (wrong_content(HIDDEN, hidden=None), "content of hidden has tokens, hidden; given are tokens$"),
    (wrong_content(TOP, hidden=FILL), "content of top_k has tokens, ids, log_p, log_tail; given are .*hidden"),
    (wrong_content(HIDDEN, tokens=torch.tensor([1])), r"tokens = \[1\]: for each of 2 rows a number .* from 0 to 12"),
    (wrong_content(HIDDEN, tokens=torch.tensor([1, 13])), r"tokens = \[1, 13\]: for each of 2 rows"),
    (wrong_content(HIDDEN, hidden=torch.zeros(4, 17)), r"hidden of shape \(4, 17\) is not .* has shape \(\d+, 16\)"),
    (wrong_content(HIDDEN, hidden=torch.zeros(4, 16)), r"hidden is torch.float32, and torch.bfloat16 in this cache"),
    (wrong_content(TOP, ids=torch.zeros(4, 5)), "ids is torch.float32, and integers in this cache"),
    (wrong_content(TOP, ids=torch.full((4, 5), 300)), "ids has values from 300 to 300, and this cache keeps 0 to 299"),
    (wrong_content(TOP, ids=torch.full((4, 5), -1)), "ids has values from -1 to -1, and this cache keeps 0 to 299"),
    (wrong_content(TOP, log_p=torch.zeros(4, 5, dtype=torch.long)), "log_p is torch.int64, and torch.float32 in this"),
    (wrong_content(TOP, log_tail=torch.full((4,), torch.nan)), "log_tail has values that are not finite: a teacher"),
    (wrong_content(HIDDEN, hidden=torch.full((4, 16), torch.inf).bfloat16()), "hidden has values that are not finite"),
    (wrong_content(SAMPLES, distinct=torch.ones(3, dtype=torch.long)), r"distinct of shape \(3,\) is not the content"),
    (wrong_content(SAMPLES, counts=torch.ones(5, dtype=torch.long)), "counts add up to 5, and 20 draws of 4 positions"),
]


@pytest.mark.parametrize(("given", "what"), WRONG)
def test_content_that_is_not_the_caches_is_refused(given, what, tmp_path):
    identity, content = given
    with TargetWriter(tmp_path, identity, rows_per_shard=1) as writer:
        writer.add([0, 1], content_of(identity, [0, 1]))
        with pytest.raises(ValueError, match=what):
            writer.add([2, 3], content)
        assert writer.next_row == 2, "a refused batch was taken in part"


@pytest.mark.parametrize(("changed", "what"), [
    ({"kind": "logits"}, "there is no kind 'logits' of targets; there are hidden, samples, top_k"),
    ({"dtype": "float64"}, "dtype 'float64' is not kept for hidden; float32, bfloat16, float16 are"),
    ({"width": None}, "width = None: hidden takes width"), ({"k": 5}, "k = 5: hidden takes width"),
    ({"width": 0}, "width = 0: a number above zero is expected"), ({"rows": 0}, "rows = 0: a number above zero"),
    ({"kind": "samples", "width": None, "dtype": "bfloat16"},
     "dtype 'bfloat16' is not kept for samples; float32, float16 are")])
def test_identities_that_cannot_be_are_refused(changed, what):
    with pytest.raises(ValueError, match=re.escape(what)):
        replace(HIDDEN, **changed)


def test_a_shard_has_rows(tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard = 0: a shard has one row or more"):
        TargetWriter(tmp_path, HIDDEN, rows_per_shard=0)
