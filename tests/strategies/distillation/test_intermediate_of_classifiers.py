"""Losses inside encoders and vision transformers: over real tokens or patches, as a mean times the targets."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from strategies.distillation.losses.intermediate import (
    AttentionMaps,
    Features,
    IntermediateTerms,
    Relations,
    ValueRelations,
)
from strategies.distillation.losses.response import Divergence, ResponseObjective
from strategies.distillation.step import Distillation

IGNORED = -100
SIZES = {"vocab_size": 60, "num_labels": 5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}


def bert(layers, kind=BertForSequenceClassification):
    return kind(BertConfig(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
                           **SIZES))


def distilbert(layers):
    return DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=layers, n_heads=2, hidden_dim=32,
                                                                **SIZES))


def modernbert(layers):
    return ModernBertForSequenceClassification(ModernBertConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32, **SIZES, **SPECIAL))


def vit(layers):
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32, num_labels=5,
        image_size=8, patch_size=4, num_channels=1))


def pair(make, **options):
    torch.manual_seed(0)
    models = [make(4, **options).double().eval(), make(2, **options).double().eval()]
    for model in models:
        model.set_attn_implementation("eager")
    return models


def texts(length=7):
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    pad = (0, length - 7)
    return {"input_ids": torch.nn.functional.pad(ids * mask, pad), "attention_mask": torch.nn.functional.pad(mask, pad)}


def terms_of(teacher, student, inputs, targets):
    inside = IntermediateTerms(student, teacher, Features(1.0, ((0, 1), (1, 3))), Relations(1.0, 1.0, ((1, 3),)),
                               ValueRelations(1.0, ((1, 3),), 2), AttentionMaps(1.0, ((1, 3),)))
    loss = Distillation(ResponseObjective(1.0, (Divergence(temperature=2.0),)), student, teacher, shapes=(None, None),
                        intermediate=inside)
    total, terms = loss(student, inputs, targets)
    return total, {name: float(value) for name, value in terms.items()}


@pytest.mark.parametrize("make", [bert, distilbert, modernbert])
def test_padding_changes_no_term(make):
    teacher, student = pair(make)
    targets = torch.tensor([0, 1, 4])
    short, long = (terms_of(teacher, student, texts(length), targets)[1] for length in (7, 11))
    assert long == pytest.approx(short, rel=1e-6) and set(short) >= {"features", "values", "attention_maps", "angles"}


def test_features_are_a_mean_over_the_real_tokens_of_rows_with_a_target():
    teacher, student = pair(bert)
    inputs, targets = texts(), torch.tensor([0, 1, IGNORED])
    found = terms_of(teacher, student, inputs, targets)[1]["features"]
    with torch.no_grad():
        ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    apart = [((ours[mine + 1] - theirs[other + 1]) ** 2).mean(-1) for mine, other in ((0, 1), (1, 3))]
    each = [torch.cat([one[0], one[1, :4]]).mean() for one in apart]
    assert found == pytest.approx(2 * float(sum(each)) / 2, rel=1e-6)


def test_values_of_an_encoder_are_related_in_both_directions():
    """Each real token sees all others, those after it, too; an independent computation in float64."""
    teacher, student = pair(bert)
    inputs, targets = texts(), torch.tensor([0, 1, 4])
    found = terms_of(teacher, student, inputs, targets)[1]["values"]
    relations = []
    for model, layer in ((student, 1), (teacher, 3)):
        kept = {}
        block = model.bert.encoder.layer[layer].attention.self.value
        hook = block.register_forward_hook(lambda _, __, output, kept=kept: kept.update(value=output))
        model(**inputs)
        hook.remove()
        heads = kept["value"].unflatten(-1, (2, 8)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / 8**0.5
        hidden = inputs["attention_mask"][:, None, None, :] == 0
        relations.append(scores.masked_fill(hidden, -torch.inf).log_softmax(-1))
    ours, theirs = relations
    apart = (theirs.exp() * (theirs - ours)).nan_to_num().sum(-1).mean(1)
    real = inputs["attention_mask"].bool()
    assert found == pytest.approx(3 * float(apart[real].mean()), rel=1e-5)


def test_tokens_without_a_class_count_inside_all_the_same():
    """Sub-tokens have no class of their own, and hidden states that can be matched."""
    teacher, student = pair(bert, kind=BertForTokenClassification)
    inputs = texts()
    whole, some = torch.zeros(3, 7, dtype=torch.long), torch.full((3, 7), IGNORED)
    some[:, 1] = 2
    found = [terms_of(teacher, student, inputs, targets)[1]["features"] for targets in (whole, some)]
    assert found[0] / 21 == pytest.approx(found[1] / 3, rel=1e-6)


def test_a_vision_transformer_is_matched_patch_by_patch():
    teacher, student = pair(vit)
    inputs = {"pixel_values": torch.randn(3, 1, 8, 8, dtype=torch.float64)}
    total, found = terms_of(teacher, student, inputs, torch.tensor([0, 1, 2]))
    total.backward()
    with torch.no_grad():
        ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    apart = [((ours[mine + 1] - theirs[other + 1]) ** 2).mean() for mine, other in ((0, 1), (1, 3))]
    assert found["features"] == pytest.approx(3 * float(sum(apart)) / 2, rel=1e-6)
    assert all(parameter.grad is not None for parameter in student.parameters())
