"""A text and an image classifier taught by larger ones: real trainings, small enough for any machine."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from strategies.distillation.losses.attention import relation_sum, visible_pairs
from strategies.distillation.losses.features import Projections, squared_error_sum
from strategies.distillation.losses.layer_map import layer_map
from strategies.distillation.losses.recorder import Values
from strategies.distillation.losses.relations import sample_distances_sum
from strategies.distillation.losses.response import cross_entropy_sum, kl_sum

CLASSES, MASK = 5, 1
TEACHER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
STUDENT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}


def text(samples, seed):
    """Sentences of 5 to 8 tokens, padded; the class is told by the first three, each one of a fifth of all words."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    ids = torch.randint(2, 27, (samples, 8), generator=generator)
    ids[:, :3] = 2 + labels[:, None] + CLASSES * torch.randint(5, (samples, 3), generator=generator)
    real = torch.arange(8) < torch.randint(5, 9, (samples, 1), generator=generator)
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real}, real, labels


def bert(sizes):
    return BertForSequenceClassification(BertConfig(vocab_size=27, max_position_embeddings=8, num_labels=CLASSES,
                                                    **sizes, **QUIET))


def images(samples, seed):
    """Noisy waves of 9 x 9 pixels; the class is the direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    angle, phase = labels * torch.pi / CLASSES, 6.28 * torch.rand(samples, generator=generator)
    at = torch.arange(9.0)
    wave = at[:, None] * angle.sin()[:, None, None] + at * angle.cos()[:, None, None] + phase[:, None, None]
    pixels = wave.sin() + 0.5 * torch.randn(samples, 9, 9, generator=generator)
    return {"pixel_values": pixels[:, None]}, torch.ones(samples, 10, dtype=torch.bool), labels


def vit(sizes):
    return ViTForImageClassification(ViTConfig(image_size=9, patch_size=3, num_channels=1, num_labels=CLASSES, **sizes,
                                               **QUIET))


def run(model, layers, inputs):
    """Logits, and what `layers` leave."""
    with Values(model, layers, ("hidden", "value")) as values:
        return model(**inputs).logits, values


def terms(student, teacher, pairs, batch, project):
    """Each term of the loss, divided by the samples or tokens that it is a sum over."""
    inputs, real, labels = batch
    logits, ours = run(student, [layer for layer, _ in pairs], inputs)
    with torch.no_grad():
        wanted, theirs = run(teacher, [layer for _, layer in pairs], inputs)
    s, t = pairs[-1]
    feature = sum(squared_error_sum(project(ours.of(s, "hidden"), s), theirs.of(t, "hidden"), real) for s, t in pairs)
    relation = relation_sum(ours.of(s), theirs.of(t), real, visible_pairs(real, causal=False), 4)
    distance = sample_distances_sum(ours.of(s, "hidden")[:, 0], theirs.of(t, "hidden")[:, 0])
    by_sample = {"text": cross_entropy_sum(logits, labels), "response": kl_sum(logits, wanted, labels, 2.0),
                 "distance": distance}
    return {name: value / len(labels) for name, value in by_sample.items()} | \
        {"feature": feature / real.sum(), "relation": relation / real.sum()}


def batches(data, seed):
    """A hundred of 32 samples."""
    inputs, real, labels = data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        at = torch.randint(len(labels), (32,), generator=generator)
        yield {name: x[at] for name, x in inputs.items()}, real[at], labels[at]


def train(model, data, seed, loss):
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for batch in batches(data, seed):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def by_text(model):
    """Cross-entropy with the labels alone."""
    return lambda batch: cross_entropy_sum(model(**batch[0]).logits, batch[2]) / len(batch[2])


@torch.no_grad()
def distance_to_teacher(student, teacher, pairs, held):
    """`terms` on samples that neither has seen, the feature term after the linear map that fits best."""
    inputs, real, _ = held
    hidden = {}
    for side, model in enumerate((student, teacher)):
        layers = [pair[side] for pair in pairs]
        values = run(model, layers, inputs)[1]
        hidden[side] = [values.of(layer, "hidden")[real] for layer in layers]
    fitted = {s: torch.linalg.lstsq(ours, theirs).solution
              for (s, _), ours, theirs in zip(pairs, hidden[0], hidden[1], strict=True)}
    found = terms(student, teacher, pairs, held, lambda states, layer: states @ fitted[layer])
    return {name: value.item() for name, value in found.items()}


WEIGHTS = {"text": 1.0, "response": 1.0, "feature": 0.1, "relation": 1.0, "distance": 1.0}


@pytest.mark.parametrize(("make", "data"), [(bert, text), (vit, images)], ids=["bert", "vit"])
def test_a_taught_student_ends_closer_to_its_teacher_in_every_term(make, data):
    """Same start, same few labeled samples in the same order; only the teacher is added."""
    few, held = data(100, seed=1), data(300, seed=2)
    torch.manual_seed(0)
    teacher = make(TEACHER)
    train(teacher, data(2000, seed=0), 0, by_text(teacher))
    with torch.no_grad():
        assert (teacher(**held[0]).logits.argmax(-1) == held[2]).float().mean() > 0.9
    pairs = layer_map(2, 4, "uniform")
    alone, teacher_targets = make(STUDENT), make(STUDENT)
    teacher_targets.load_state_dict(alone.state_dict())
    train(alone, few, 1, by_text(alone))

    projections = Projections(pairs, 16, 32)
    projections.attach(teacher_targets)
    train(teacher_targets, few, 1, lambda batch: sum(WEIGHTS[name] * value for name, value in
                                            terms(teacher_targets, teacher, pairs, batch, projections).items()))
    Projections.detach_from(teacher_targets)
    without, closer = (distance_to_teacher(student, teacher, pairs, held) for student in (alone, teacher_targets))
    for name, part in (("response", 0.9), ("feature", 0.9), ("relation", 0.7), ("distance", 0.9)):
        assert closer[name] < part * without[name], (name, closer, without)
