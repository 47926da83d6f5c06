"""What is cut and what a cut computes, beside references written out here in float64."""

import copy

import pytest
import torch
from torch.nn import functional

from benchmarks.pruning.tiny_families import make, rows
from strategies.pruning.structured.cut import Cut
from strategies.pruning.structured.cut_model import cut_model

KEPT = 48  # of 64 channels, or of 96
WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj", "o_proj.bias", "down_proj.bias")


def inputs_of_layers(model, batch, end):
    """What enters each module whose name ends so, (tokens that count, channels), by name."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(end):
            handles.append(module.register_forward_pre_hook(
                lambda _, args, name=name: found.__setitem__(name, args[0].detach())))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: value[batch["attention_mask"].bool()] for name, value in found.items()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def eager(model):
    """The model with its experts one after another, which products of all of them in float64 need."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def close(found, expected, tolerance=1e-6):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def top(scores, count):
    return sorted(scores.argsort(descending=True)[:count].tolist())


@pytest.fixture
def whole():
    return make("llama").double()


def cut_of(whole, **asked):
    """A cut of the model in fp32, in float64, and what was kept by the record."""
    smaller, record = cut_model(copy.deepcopy(whole).float(), Cut(**asked), [rows(whole)])
    return smaller.double(), {name: one["kept"] for step in record["steps"] for name, one in step["units"].items()}


def test_channels_with_the_least_activations_go(whole):
    batch = rows(whole)
    smaller, kept = cut_of(whole, mlp=KEPT)
    for number, values in enumerate(inputs_of_layers(whole, batch, "down_proj").values()):
        chosen = top(values.norm(dim=0), KEPT)
        assert kept[f"mlp model.layers.{number}"] == chosen
        gone = sorted({*range(96)} - {*chosen})
        whole.model.layers[number].mlp.down_proj.weight.data[:, gone] = 0
    close(logits(smaller, batch), logits(whole, batch))


@pytest.mark.parametrize("asked, groups, each", [({"heads": 4}, 4, 1), ({"kv_heads": 2}, 2, 2),
                                                 ({"heads": 2, "kv_heads": 2}, 2, 1)])
def test_heads_go_within_their_groups(whole, asked, groups, each):
    batch = rows(whole)
    smaller, kept = cut_of(whole, **asked)
    for number, values in enumerate(inputs_of_layers(whole, batch, "o_proj").values()):
        squares = values.unflatten(-1, (4, 2, 8)).square().sum((0, -1))  # by group and head
        heads = [2 * group + head for group in top(squares.sum(1), groups) for head in top(squares[group], each)]
        assert kept[f"heads model.layers.{number}"] == heads
        assert kept[f"kv_heads model.layers.{number}"] == top(squares.sum(1), groups)
        projection = whole.model.layers[number].self_attn.o_proj.weight.data.unflatten(-1, (8, 8))
        projection[:, [head for head in range(8) if head not in heads]] = 0
    close(logits(smaller, batch), logits(whole, batch))


def test_channels_of_the_residual_stream_go_from_norms_and_all_that_writes_it(whole):
    batch = rows(whole)
    smaller, kept = cut_of(whole, width=KEPT)
    scores = sum(values.square().sum(0) for end in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
                 for values in inputs_of_layers(whole, batch, end).values())
    assert kept["width"] == top(scores, KEPT)
    gone = sorted({*range(64)} - {*kept["width"]})
    for name, module in whole.named_modules():
        if name.endswith("embed_tokens"):
            module.weight.data[:, gone] = 0
        elif name.endswith(("o_proj", "down_proj")):
            module.weight.data[gone] = 0
            module.bias.data[gone] = 0
        elif name.endswith("norm"):  # zeros add nothing to its sum of squares, and are not counted in its mean
            module.forward = lambda values, module=module: module.weight * values * (
                values.square().sum(-1, keepdim=True) / KEPT + module.variance_epsilon).rsqrt()
    close(logits(smaller, batch), logits(whole, batch))


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen3_moe"])
def test_a_rotated_stream_is_projected_onto_its_principal_components(family):
    """The reference keeps its width and its norms: only what is written to the stream is projected."""
    whole = eager(make(family).double())
    batch = rows(whole)
    smaller, record = cut_model(copy.deepcopy(whole).float(), Cut(width=KEPT, width_by="rotation"), [batch])
    eager(smaller)
    states = inputs_of_layers(whole, batch, "layernorm") | inputs_of_layers(whole, batch, "model.norm")
    units = torch.cat([functional.normalize(one, dim=-1) for one in states.values()])
    _, directions = torch.linalg.eigh(units.T @ units)
    projection = directions[:, -KEPT:] @ directions[:, -KEPT:].T
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    for name, weight in whole.named_parameters():
        if "embed_tokens" in name:
            weight.data = weight.data @ projection
        elif name.endswith(WRITERS):
            weight.data = projection @ weight.data
    close(logits(smaller.double(), batch), logits(whole, batch), 1e-5)
    assert record["steps"][0]["units"]["width"]["untied"] == (family == "llama, tied")
    assert not smaller.config.tie_word_embeddings


def test_a_rotation_loses_less_than_a_selection_on_average():
    off = {"rotation": 0.0, "selection": 0.0}
    for seed in range(3):
        whole = make("qwen2", seed)
        batch = rows(whole)
        expected = logits(whole, batch).log_softmax(-1)
        for by in off:
            smaller, _ = cut_model(copy.deepcopy(whole), Cut(width=KEPT, width_by=by), [batch])
            found = logits(smaller, batch).log_softmax(-1)
            off[by] += float((expected.exp() * (expected - found)).sum(-1).mean())
    assert off["rotation"] < off["selection"]


def test_blocks_that_change_hidden_states_the_least_go(whole):
    batch = rows(whole)
    for number in (0, 2):  # they hardly write anything
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer = whole.model.layers[number].get_submodule(name)
            layer.weight.data *= 1e-3
            layer.bias.data *= 1e-3
    states = []
    handles = [block.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
               for block in whole.model.layers]
    logits(whole, batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    influence = [1 - (before * after).sum(-1)[mask].div(before.norm(dim=-1)[mask] * after.norm(dim=-1)[mask]).mean()
                 for before, after in states]
    smaller, record = cut_model(copy.deepcopy(whole).float(), Cut(layers=2), [batch])
    units = record["steps"][0]["units"]["layers"]
    assert units["kept"] == [1, 3]
    torch.testing.assert_close(torch.tensor(units["scores"]), torch.tensor(influence).float(), rtol=1e-4, atol=1e-6)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[1], whole.model.layers[3]])
    close(logits(smaller.double(), batch), logits(whole, batch))


def test_experts_to_which_tokens_are_routed_least_go_and_their_routers_forget_them():
    whole = eager(make("mixtral").double())
    batch = rows(whole)
    smaller, record = cut_model(copy.deepcopy(whole).float(), Cut(experts=4), [batch])
    eager(smaller)
    mask = batch["attention_mask"].bool().flatten()
    with torch.no_grad():
        routed = whole(**batch, output_router_logits=True).router_logits
    for number, scores in enumerate(routed):
        weights, index = scores[mask].softmax(-1).topk(2)
        sums = torch.zeros(8, dtype=torch.float64).index_add_(
            0, index.flatten(), (weights / weights.sum(-1, keepdim=True)).double().flatten())
        kept = record["steps"][0]["units"][f"experts model.layers.{number}"]["kept"]
        assert kept == top(sums, 4)
        gate = whole.model.layers[number].mlp.gate

        def without(hidden, gate=gate, kept=kept):
            scores = hidden @ gate.weight.T
            lost = torch.full_like(scores, -torch.inf)
            lost[:, kept] = scores[:, kept]
            weights, index = lost.softmax(-1).topk(2)
            return lost, weights / weights.sum(-1, keepdim=True), index

        gate.forward = without
    close(logits(smaller.double(), batch), logits(whole, batch))


def cross_entropy(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    return functional.cross_entropy(model(**inputs).logits.flatten(0, -2), batch["targets"].flatten())


def test_the_gradient_ranks_units_by_the_first_order_change_of_the_loss():
    whole = make("llama").double()
    batch = {**rows(whole), "targets": torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(2))}
    parts = [{name: value[begin:begin + 2] for name, value in batch.items()} for begin in (0, 2)]
    expected = torch.zeros(4, 96, dtype=torch.float64)
    for part in parts:
        whole.zero_grad()
        cross_entropy(whole, part).backward()
        for number, block in enumerate(whole.model.layers):
            for name, weight in block.mlp.named_parameters():
                if name == "down_proj.bias":
                    continue
                product = (weight.detach() * weight.grad).abs()
                for channel in range(96):
                    expected[number, channel] += (product[:, channel] if name == "down_proj.weight" else
                                                  product[channel]).sum()
    _, record = cut_model(copy.deepcopy(whole).float(), Cut(mlp=KEPT), parts, cross_entropy, "gradient")
    for number in range(4):
        units = record["steps"][0]["units"][f"mlp model.layers.{number}"]
        torch.testing.assert_close(torch.tensor(units["scores"]).double(), expected[number], rtol=1e-4, atol=1e-6)
        assert units["kept"] == top(expected[number], KEPT)


@pytest.mark.parametrize("importance", ["activations", "gradient", "magnitude"])
def test_a_permutation_of_units_permutes_what_is_kept_and_changes_nothing_else(importance):
    whole = make("qwen3")
    batch = {**rows(whole), "targets": torch.randint(3, 100, (4, 12))}
    permuted, order = copy.deepcopy(whole), torch.randperm(96, generator=torch.Generator().manual_seed(3))
    for block in permuted.model.layers:
        for name in ("gate_proj", "up_proj"):
            block.mlp.get_submodule(name).weight.data = block.mlp.get_submodule(name).weight.data[order]
        block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data[:, order]
    results = [cut_model(one, Cut(mlp=KEPT), [batch], cross_entropy, importance) for one in (whole, permuted)]
    for number in range(4):
        one, other = (record["steps"][0]["units"][f"mlp model.layers.{number}"]["kept"] for _, record in results)
        assert one == sorted(order[other].tolist())
    batch.pop("targets")
    close(logits(results[0][0], batch), logits(results[1][0], batch), 1e-4)


@pytest.mark.parametrize("family, cut", [("llama", {"mlp": 0.5}), ("llama", {"width": 0.5}), ("mixtral", {
    "experts": 0.5}), ("mixtral", {"mlp": 0.5}), ("llama", {"layers": 0.5}), ("llama", {
        "width": 0.75, "width_by": "rotation"})])
def test_padding_does_not_count(family, cut):
    """The same rows padded by a mask, or packed and padded with the padding named in `counted`, score alike."""
    whole = make(family)
    plain, padded = rows(whole, padded=0), rows(whole, padded=0)
    ids = torch.cat([padded["input_ids"], torch.full((4, 5), 7)], 1)
    counted = torch.cat([torch.ones(4, 12), torch.zeros(4, 5)], 1).long()
    results = [cut_model(copy.deepcopy(whole), Cut(**cut), [batch])[1]["steps"][0]["units"] for batch in (
        plain, {"input_ids": ids, "attention_mask": counted}, {"input_ids": ids, "counted": counted.bool()})]
    for label, units in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(torch.tensor(units["scores"]), torch.tensor(other[label]["scores"]),
                                       rtol=1e-4, atol=1e-5)


def test_channels_of_a_convolutional_net_are_those_that_carry_the_most():
    """Channels that no weight writes are cut, in the stem, in what residual connections share and within blocks."""
    whole = make("resnet")
    planted = {}
    generator = torch.Generator().manual_seed(5)
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "shortcut" not in name and "layer.2" not in name:
            silent = torch.randperm(module.num_features, generator=generator)[:module.num_features // 2]
            module.weight.data *= 1e-3
            module.bias.data = module.bias.data.abs() + 1  # the others are there on every image
            module.weight.data[silent], module.bias.data[silent] = 0.0, 0.0
            planted[name.replace("normalization", "convolution")] = sorted({*range(module.num_features)} - {
                *silent.tolist()})
    batch = rows(whole)
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):  # what blocks of a stage add up
        layer = whole.resnet.encoder.stages[stage].layers[block]
        for part in (layer.layer[2], layer.shortcut):
            if isinstance(part, torch.nn.Identity):
                continue
            part.normalization.weight.data[::2] *= 0.0
            part.normalization.bias.data[::2] *= 0.0
    with torch.no_grad():
        expected = whole(**batch).logits
    smaller, record = cut_model(whole, Cut(channels=0.5), [batch])
    with torch.no_grad():
        close(smaller(**batch).logits, expected, 1e-5)  # nothing that says anything was cut
    units = {label.removeprefix("channels "): one["kept"] for label, one in record["steps"][0]["units"].items()}
    assert {name: units[name] for name in planted} == planted
