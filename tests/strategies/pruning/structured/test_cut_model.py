"""Cuts of every family: plain transformers reloads them, shapes are those foretold, other cuts are refused in words."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pruning.tiny_families import CUTS, FAMILIES, kinds_of, make, rows
from strategies.pruning.structured.config_steps import cut_config
from strategies.pruning.structured.cut import Cut
from strategies.pruning.structured.cut_model import cut_model
from strategies.pruning.structured.meta_shapes import tensor_shapes

MORE = ("mistral", "phi3", "gpt_neox", "roberta", "gpt_oss", "deepseek_v3", "gemma2")  # like others, and as right
# Heads make up the width: one is not cut without the other.
JOINED = ("gpt2", "gpt_neox", "bert", "roberta", "modernbert")
REFUSED = {**{(family, kind): f"{{kind}}: the width of a {family} model is that of its heads"
              for family in JOINED for kind in ("heads", "kv_heads", "width")},
           **{(family, "rotation"): "use selection" for family in (*JOINED, "vit", "gemma2")},
           **{("gemma2", kind): "its logits are" for kind in ("width", "heads and width")}}  # it scales by its width


@pytest.mark.parametrize("family, kind", [pytest.param(family, kind, marks=pytest.mark.long if family in MORE else ())
                                          for family in FAMILIES for kind in kinds_of(family)])
def test_a_cut_reloads_and_computes_the_whole_model_without_what_was_cut(family, kind, tmp_path):
    model, cut = make(family), Cut(**CUTS[kind])
    batch, whole = rows(model), sum(one.numel() for one in model.parameters())
    if (family, kind) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family, kind].format(kind="heads" if "heads" in kind else kind)):
            cut_model(model, cut, [batch])
        return
    foretold = tensor_shapes(cut_config(model.config, cut))
    smaller, record = cut_model(model, cut, [batch])
    assert {name: tuple(one.shape) for name, one in smaller.state_dict().items()} == foretold
    assert record["after"]["parameters"] == sum(one.numel() for one in smaller.parameters()) < whole
    rounded = 1e-6 if kind == "rotation" else 1e-12  # norms of a rotated model carry a factor in fp32
    assert all(step["difference"] <= rounded for step in record["steps"])
    smaller.save_pretrained(tmp_path)
    again = type(smaller).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = again(**batch).logits, smaller(**batch).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_all_kinds_at_once_are_cut_in_their_order():
    model = make("mixtral")
    cut = Cut(heads=4, kv_heads=2, mlp=0.5, width=48, layers=2, experts=4, multiple_of=16)
    batch = rows(model)
    smaller, record = cut_model(model, cut, [batch])
    assert [step["kind"] for step in record["steps"]] == ["layers", "experts", "heads", "mlp", "width"]
    config = smaller.config
    assert (config.num_hidden_layers, config.num_local_experts, config.num_attention_heads, config.num_key_value_heads,
            config.intermediate_size, config.hidden_size, config.head_dim) == (2, 4, 4, 2, 48, 48, 8)
    assert record["before"]["parameters"] > record["after"]["parameters"]
    assert record["steps"][0]["after"] == record["steps"][1]["before"]


@pytest.mark.parametrize("family, asked, message", [
    ("llama", {"heads": 6}, "heads: 6 cannot be shared evenly by 4 key-value heads .* the nearest that can: 8"),
    ("llama", {"heads": 0.05}, "leaves less than one head for each of 4 .* the least is 4, or cut `kv_heads`"),
    ("llama", {"kv_heads": 3}, "kv_heads: 6 query and 3 key-value heads are no llama model .* that are: 4 and 2"),
    ("llama", {"kv_heads": 4}, "kv_heads: 4 of 4 keeps all of them, so that nothing is cut; use at most 3"),
    ("llama", {"mlp": 200}, "mlp: 200 cannot remain, there are 96; use fewer than 96"),
    ("llama", {"mlp": 0.1, "multiple_of": 64}, "leaves none as a multiple of 64; the least is 64"),
    ("llama", {"width": 52}, "width: 52 of 64 is no llama model .* the nearest that is: 48"),
    ("llama", {"experts": 2}, "experts: a llama model has none"),
    ("llama", {"channels": 0.5}, "channels: a llama configuration has no numbers of channels"),
    ("llama", {"layers": 4}, "layers: 4 of 4 keeps all"),
    ("mixtral", {"experts": 1}, "each token is routed to 2; use at least 2"),
    ("mixtral", {"mlp": 50}, "multiple of 8; use 48"),
    ("deepseek_v3", {"experts": 5}, "by the 2 groups .*; use 4"),
    ("gpt2", {"heads": 2, "width": 40}, "width: 40 is not that of 2 heads of 16 channels each; use 32"),
    ("resnet", {"layers": 0.5}, "layers of a resnet model cannot be cut"),
    ("resnet", {"mlp": 0.5}, "mlp: a resnet configuration has no size"),
    ("mobilenet_v2", {"channels": 0.5, "multiple_of": 4}, "multiples of 8 by its own rule"),
])
def test_what_a_configuration_cannot_say_is_refused_from_shapes_alone(family, asked, message):
    with pytest.raises(ValueError, match=message):
        cut_config(make(family).config, Cut(**asked))


@pytest.mark.parametrize("asked, message", [
    ({}, "nothing is cut: give at least one of heads"),
    ({"mlp": 1.0}, "mlp: 1.0 .*nothing is cut"),
    ({"mlp": 1.5}, "neither a fraction between 0 and 1 nor a count"),
    ({"layers": 0}, "layers: 0 is neither"),
    ({"channels": 8}, "is no fraction"),
    ({"mlp": 0.5, "width_by": "rotation"}, "rotation needs a `width`"),
])
def test_a_cut_that_is_none_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        Cut(**asked)


def test_a_fraction_takes_the_nearest_count_that_the_configuration_can_say():
    config = cut_config(make("llama").config, Cut(width=0.8, kv_heads=0.7))
    assert config.num_attention_heads == 4 and config.hidden_size == 52  # 6 heads do not divide 64, nor 4 heads 51
    assert config.head_dim == 8


def test_rows_and_losses_that_are_missing_are_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="needs calibration rows"):
        cut_model(model, Cut(mlp=0.5), [])
    with pytest.raises(ValueError, match="needs a loss"):
        cut_model(model, Cut(mlp=0.5), [rows(model)], importance="gradient")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        cut_model(model, Cut(mlp=0.5), [rows(model)])


class Freed(TorchDispatchMode):
    """How many of some tensors' storages are gone whenever a part of a tensor is taken."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.gone = [StorageWeakRef(one.untyped_storage()) for one in tensors], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            self.gone.append(sum(one.expired() for one in self.storages))
        return func(*args, **(kwargs or {}))


def test_weights_are_replaced_one_after_another():
    """Memory holds the model and one weight more: when the last is cut, all others have gone."""
    model = make("qwen2")
    with Freed([weight for name, weight in model.named_parameters() if ".mlp." in name]) as freed:
        cut_model(model, Cut(mlp=0.5), [rows(model)])
    assert freed.gone[0] == 0 and freed.gone[-1] >= len(freed.storages) - 1


def test_the_model_is_used_up_and_weights_that_stay_are_not_copied():
    model = make("llama, tied")
    embeddings, up = model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight
    place = embeddings.data_ptr()
    smaller, _ = cut_model(model, Cut(mlp=0.5), [rows(model)])
    assert smaller.model.embed_tokens.weight.data_ptr() == place and up.numel() == 0
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert smaller.config.use_cache and not smaller.training
