"""The exported code: what it leaves out is not computed, and what it computes is what training's own code says."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from strategies.pruning.early_exit.exit_decisions import TokenDepths, classifier_logits, confidence, first_confident
from strategies.pruning.early_exit.exit_folder import write_exits
from strategies.pruning.early_exit.exit_heads import attach_exits, detach_exits, parts_of, pooling_of
from tests.strategies.pruning.early_exit.exit_models import CLASSIFIERS, LANGUAGE, code_of, inputs_of, made
from tests.test_structure import imports

LAYERS = [0, 2]
CAP = {"gemma3": 3.0}


def with_exits(model, pooling="first"):
    attach_exits(model, LAYERS, pooling)
    exits = detach_exits(model).eval()
    for exit in exits.values():  # far from each other, so that rows leave at different exits
        if hasattr(exit, "linear"):
            torch.nn.init.normal_(exit.linear.weight)
    return exits


def written(tmp_path, model, exits, threshold=0.6, cap=None):
    model.save_pretrained(tmp_path)
    write_exits(tmp_path, model, exits, threshold, [], cap=cap)
    return code_of(tmp_path).load(tmp_path)


def counted(model):
    """How often the parts inside of each block are called, by its number."""
    calls = [0] * len(model.blocks)
    for number, block in enumerate(model.blocks):
        def count(*_, number=number):
            calls[number] += 1

        for part in block.modules():
            if part is not block:
                part.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_batch_of_mixed_exits_equals_its_rows_and_the_rule_at_full_depth(tmp_path, name):
    model, inputs = made(CLASSIFIERS[name]), inputs_of(made(CLASSIFIERS[name]))
    exits = with_exits(model, pooling_of(model, {key: tensor[:1] for key, tensor in inputs.items()}))
    logits = classifier_logits(model, exits, inputs)
    sure = torch.stack([confidence(one, inputs.get("attention_mask")) for one in logits[:-1]], 1)
    threshold = float(sure.median()) + 1e-4
    where = first_confident(sure, threshold)
    assert len(where.unique()) > 1, "rows leave at different exits"
    loaded = written(tmp_path, model, exits, threshold)
    answer = loaded.classify(**inputs)
    assert answer.blocks.tolist() == [[1, 3, 4][one] for one in where]
    torch.testing.assert_close(answer.logits, logits[where, torch.arange(6)], rtol=1e-5, atol=1e-5)
    for row in range(6):
        alone = loaded.classify(**{key: tensor[row:row + 1] for key, tensor in inputs.items()})
        assert alone.blocks[0] == answer.blocks[row]
        torch.testing.assert_close(alone.logits[0], answer.logits[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_blocks_behind_an_exit_are_not_called(tmp_path, name):
    model = made(CLASSIFIERS[name])
    loaded, inputs = written(tmp_path, model, with_exits(model)), inputs_of(model)
    calls = counted(loaded)
    loaded.classify(threshold=1e-6, **inputs)
    assert calls[0] and calls[1:] == [0, 0, 0]
    loaded.classify(threshold=2.0, **inputs)
    assert all(calls)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_where_nothing_leaves_it_is_the_plain_model(tmp_path, name):
    model = made(CLASSIFIERS[name])
    loaded, inputs = written(tmp_path, model, with_exits(model)), inputs_of(model)
    with torch.no_grad():
        plain = model(**inputs).logits
    answer = loaded.classify(threshold=1.5, **inputs)
    torch.testing.assert_close(answer.logits, plain, rtol=0, atol=1e-6)
    assert set(answer.blocks.tolist()) == {4}
    with torch.no_grad():  # and its blocks are left as they were
        torch.testing.assert_close(loaded.model(**inputs).logits, plain, rtol=0, atol=1e-6)


def depths_of(name, model, exits):
    def logits(normed):
        scores = model.get_output_embeddings()(normed)
        return scores if name not in CAP else CAP[name] * torch.tanh(scores / CAP[name])

    return TokenDepths(model, exits, model.get_submodule(parts_of(model).norm), logits)


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_with_a_cache_is_the_parallel_computation(tmp_path, name):
    """Tokens leave after the same blocks, and those after them are predicted from the same keys and values."""
    model = made(LANGUAGE[name])
    exits, ids = with_exits(model), torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(2))
    loaded = written(tmp_path, model, exits, cap=CAP.get(name))
    depths, leaves = depths_of(name, model, exits), torch.arange(24)[None] >= 6
    seen = set()
    for threshold in (0.03, 0.05, 0.07, 0.1):
        ours = depths({"input_ids": ids, "use_cache": False}, ids.roll(-1, 1), threshold, leaves)
        theirs = loaded.generate(ids[:, :6], threshold=threshold, follow=ids[0, 6:])
        assert theirs.blocks == [[1, 3, 4][one] for one in ours.exit[0, 5:]]
        nats = F.cross_entropy(theirs.logits[:-1], ids[0, 6:], reduction="none")
        torch.testing.assert_close(nats, ours.nats[0, 5:-1], rtol=1e-5, atol=1e-5)
        seen |= set(theirs.blocks)
    assert seen >= {1, 4}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_token_that_has_left_only_fills_the_cache_behind_its_exit(tmp_path, name):
    """Neither an output projection nor a feed-forward runs there, and the cache is as long in every block."""
    model = made(LANGUAGE[name])
    loaded = written(tmp_path, model, with_exits(model), cap=CAP.get(name))
    caches, filled = [], sys.modules["early_exit"].FilledCache(config=loaded.model.config)
    loaded._next(torch.tensor([[1, 2, 3]]), filled, 2.0)
    for number, block in enumerate(loaded.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: caches.append(number))
    _, depth = loaded._next(torch.tensor([[4]]), filled, 1e-6)
    assert depth == 1 and caches == [0]
    assert {filled.get_seq_length(number) for number in range(4)} == {4} and filled.layers[3].keys.shape[-2] == 4


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_where_nothing_leaves_is_transformers_own(tmp_path, name):
    model = made(LANGUAGE[name])
    model.generation_config.eos_token_id = None
    loaded, ids = written(tmp_path, model, with_exits(model), cap=CAP.get(name)), torch.tensor([[5, 9, 11, 2]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 4:]
    found = loaded.generate(ids, max_new_tokens=12, threshold=2.0)
    assert torch.equal(found.ids, plain) and found.blocks == [4] * 12
    whole = model(input_ids=torch.cat([ids[0], plain])[None]).logits[0, 3:-1]
    torch.testing.assert_close(found.logits, whole, rtol=1e-5, atol=1e-5)


def test_parallel_depths_where_nothing_leaves_and_where_everything_does():
    model = made(LANGUAGE["llama"])
    exits, ids = with_exits(model), torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(10) == 9, -100)
    depths, given = depths_of("llama", model, exits), {"input_ids": ids, "use_cache": False}
    whole = depths(given, targets, 2.0)
    with torch.no_grad():
        plain = model(**given, output_hidden_states=True)
    nats = F.cross_entropy(plain.logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 10)
    torch.testing.assert_close(whole.nats, nats, rtol=1e-5, atol=1e-5)
    assert set(whole.exit.flatten().tolist()) == {2}
    first = depths(given, targets, 0.0)
    with torch.no_grad():
        logits = model.lm_head(exits["0"](plain.hidden_states[1]))
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 10)
    torch.testing.assert_close(first.nats, nats, rtol=1e-5, atol=1e-5)
    assert set(first.exit.flatten().tolist()) == {0}


def test_it_stops_at_the_end_of_a_text_and_takes_one_row(tmp_path):
    model = made(LANGUAGE["llama"])
    ids = torch.tensor([[5, 9, 11]])
    model.generation_config.eos_token_id = int(model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None,
                                                              pad_token_id=0)[0, -1])
    loaded = written(tmp_path, model, with_exits(model))
    found = loaded.generate(ids, max_new_tokens=9, threshold=2.0)
    assert found.ids[-1] == model.generation_config.eos_token_id and len(found.ids) <= 3
    with pytest.raises(ValueError, match="one row at a time"):
        loaded.generate(torch.tensor([[1], [2]]))


def test_the_folder_is_plain_and_its_code_needs_nothing_of_this_project(tmp_path):
    """Nothing in it is pickled."""
    model = made(LANGUAGE["llama"])
    written(tmp_path, model, with_exits(model), 0.4)
    assert {file.suffix for file in tmp_path.iterdir() if file.is_file()} <= {".json", ".safetensors", ".py"}
    about = json.loads((tmp_path / "exits.json").read_text())
    assert about["layers"] == LAYERS and about["threshold"] == 0.4 and about["norm"] == "model.norm"
    assert {one.split(".")[0] for one in imports(tmp_path / "early_exit.py")} <= {
        "__future__", *sys.stdlib_module_names, "torch", "transformers", "safetensors", "PIL"}
