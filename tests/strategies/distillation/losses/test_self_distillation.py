"""What exits learn, against the definition in float64 with all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from strategies.distillation.losses.response import IGNORED, ResponseObjective
from strategies.distillation.losses.self_distillation import ExitObjective, ExitTerms
from strategies.distillation.step import Distillation

LAYERS = (0, 2)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 60}
IDS = torch.arange(40).reshape(4, 10) % 60


class First(nn.Module):
    """An exit of a classifier for these tests: the first token's class."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, hidden, mask):
        return self.linear(hidden[:, 0])


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    model.exits = nn.ModuleDict({str(layer): nn.LayerNorm(16).double() for layer in LAYERS})
    for exit in model.exits.values():
        nn.init.uniform_(exit.weight, 0.5, 2)
    return model


def bert():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        **SIZES, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).double()
    model.exits = nn.ModuleDict({str(layer): First().double() for layer in LAYERS})
    return model


def targets_of(model):
    if isinstance(model, BertForSequenceClassification):
        return torch.tensor([0, 2, IGNORED, 1])
    return IDS.roll(-1, 1).masked_fill(torch.arange(10) % 4 == 3, IGNORED)


def inputs_of(model, ids=IDS):
    return {"input_ids": ids} | ({} if isinstance(model, BertForSequenceClassification) else {"use_cache": False})


def ours(model, objective, ids=IDS, targets=None, tile=None):
    shapes = {"shapes": (None, None)} if isinstance(model, BertForSequenceClassification) else {}
    loss = Distillation(ResponseObjective(divergences=()), model, tile=tile, exits=ExitTerms(model, "exits", objective),
                        **shapes)
    return loss(model, inputs_of(model, ids), targets_of(model) if targets is None else targets)


def definition(model, objective):
    """Summed over targets: CE of the model + weight * sum of shares * (c CE + (1 - c) KL(model || exit))."""
    output, targets = model(**inputs_of(model), output_hidden_states=True), targets_of(model)
    kept = targets != IGNORED
    total = F.cross_entropy(output.logits[kept], targets[kept], reduction="sum")
    own = output.logits.detach().log_softmax(-1)[kept]
    depths = [layer + 1 for layer in objective.layers]
    for layer, depth in zip(objective.layers, depths, strict=True):
        hidden, exit = output.hidden_states[layer + 1], model.exits[str(layer)]
        logits = (exit(hidden, None) if isinstance(exit, First) else model.lm_head(exit(hidden)))[kept]
        kl = (own.exp() * (own - logits.log_softmax(-1))).sum()
        hard = F.cross_entropy(logits, targets[kept], reduction="sum")
        part = objective.cross_entropy * hard + (1 - objective.cross_entropy) * kl
        total = total + objective.weight * depth / sum(depths) * part
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_the_definitions(make, share):
    model, objective = make(), ExitObjective(LAYERS, 0.7, share)
    total, terms = ours(model, objective)
    found = gradients(model, total)
    wanted = gradients(model, value := definition(model, objective))
    assert float(total.detach()) == pytest.approx(float(value.detach()), rel=1e-9) and float(terms["early_exits"]) > 0
    assert found.keys() == wanted.keys() and any("exits" in name for name in found)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [llama, bert])
def test_it_does_not_depend_on_how_rows_are_split_nor_on_rows_without_targets(make):
    model, objective = make(), ExitObjective(LAYERS)
    whole, targets = ours(model, objective)[1]["early_exits"], targets_of(model)
    parts = [ours(model, objective, IDS[part], targets[part])[1]["early_exits"] for part in (slice(1), slice(1, 4))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)
    ignored = torch.full_like(targets, IGNORED)
    padded = ours(model, objective, torch.cat([IDS, IDS]), torch.cat([targets, ignored]))[1]["early_exits"]
    assert float(padded) == pytest.approx(float(whole), rel=1e-12)


def test_an_exit_that_says_what_the_last_layer_says_learns_nothing_from_it():
    """The blocks behind the exit add nothing: its divergence is zero, and so is its gradient."""
    model = llama()
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    model.exits = nn.ModuleDict({"0": type(model.model.norm)(16).double()})
    total, terms = ours(model, ExitObjective((0,), 1.0, 0.0))
    alone = Distillation(ResponseObjective(divergences=()), model)(model, inputs_of(model), targets_of(model))[0]
    found, wanted = gradients(model, total), gradients(model, alone)
    assert abs(float(terms["early_exits"])) < 1e-9
    assert float(found.pop("exits.0.weight").abs().max()) < 1e-9
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Sees how many rows of logits exist at a time."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(one, torch.Tensor) and one.ndim >= 2 and one.shape[-1] == 60 and one.shape[-2] != 16:
                self.rows = max(self.rows, one.shape[:-1].numel())
        return found


def test_logits_of_all_positions_never_exist():
    model = llama().float()
    with Largest() as seen:
        ours(model, ExitObjective(LAYERS), tile=4 * 2 * 60 * 6)[0].backward()
    assert 0 < seen.rows <= 12  # of 40 positions: six rows of the student and of its last layer, twelve without one


def test_weights_rise_with_depth_and_sum_to_one():
    assert ExitObjective((1, 3)).shares == pytest.approx((1 / 3, 2 / 3))


@pytest.mark.parametrize("values", [{"weight": -1.0}, {"weight": float("inf")}, {"cross_entropy": 1.5}])
def test_numbers_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ExitObjective((0,), **values)
