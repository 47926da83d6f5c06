"""A convolutional net under a budget: what is computed again moves no running statistics twice."""

import copy

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from strategies.memory.meter import measure
from strategies.rematerialization.rematerialize import rematerialize, study

LR = 1e-2


def trained(model, batch, steps=3):
    optimizer, losses = torch.optim.SGD(model.parameters(), LR), []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_weights_and_statistics_are_those_without_a_budget():
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[
        1, 1], layer_type="basic", num_labels=4)).train()
    batch = {"pixel_values": torch.randn(32, 1, 32, 32), "labels": torch.randint(0, 4, (32,))}
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    budget = int(0.93 * study(model, batch, optimizer=optimizer, regions=False).keep_all().peak)
    plan = rematerialize(model, batch, budget, optimizer=optimizer)
    assert plan.overhead > 0 and not plan.fallbacks
    assert trained(model, batch) == trained(plain, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(
        model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert all(norm.num_batches_tracked == 3 for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    peak = measure(lambda: trained(model, batch, 1), "cpu", [model, *batch.values()]).peak
    assert 0.95 * plan.peak < peak <= budget
