"""Features of convolutional nets: the stages that transformers hands out, averaged to one size and projected."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from strategies.distillation.losses.features import Projections
from strategies.distillation.losses.intermediate import Features, IntermediateTerms

SIZES = {"num_channels": 1, "image_size": 32, "num_labels": 4}


def resnet(widths, **more):
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=[1] * len(widths),
                                                     layer_type="basic", **SIZES, **more))


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_is_that_of_pooled_stages_through_a_convolution_of_one_pixel(loss):
    """Against transformers' own hidden states; a row without a target counts nothing, whatever it holds."""
    torch.manual_seed(0)
    student, teacher = resnet([8, 16], downsample_in_first_stage=True).double(), resnet([12, 20, 24]).double()
    pairs, images = ((0, 1), (1, 2)), torch.randn(3, 1, 32, 32).double()
    projections = Projections(pairs, [8, 16], [12, 20, 24]).double()
    projections.attach(student)
    targets = torch.tensor([1, -100, 3])
    inside = IntermediateTerms(student, teacher, Features(1.0, pairs, loss))
    with inside.recording():
        ours, theirs = (model.eval()(pixel_values=images, output_hidden_states=True).hidden_states
                        for model in (student, teacher))
        (_, _, value), = inside.sums(targets, {"pixel_values": images})
    expected = 0
    for mine, other in pairs:
        kernel = projections.by_layer[str(mine)].weight[:, :, None, None]
        size = [min(a, b) for a, b in zip(ours[mine + 1].shape[2:], theirs[other + 1].shape[2:], strict=True)]
        one = F.conv2d(F.adaptive_avg_pool2d(ours[mine + 1], size), kernel)[[0, 2]]
        two = F.adaptive_avg_pool2d(theirs[other + 1], size)[[0, 2]]
        each = (one - two).square().mean(1) if loss == "mse" else 1 - F.cosine_similarity(one, two, dim=1)
        expected = expected + 2 * each.mean() / len(pairs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    value.backward()
    assert all(weight.grad is not None for weight in projections.parameters())


def test_maps_and_tokens_have_no_positions_in_common():
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                              intermediate_size=32, patch_size=8, **SIZES))
    student, images = resnet([8, 16]), torch.randn(2, 1, 32, 32)
    inside = IntermediateTerms(student, vit, Features(1.0, ((1, 1),)))
    with inside.recording():
        for model in (student, vit):
            model(pixel_values=images)
        with pytest.raises(ValueError, match="one has maps and the other tokens"):
            list(inside.sums(torch.tensor([0, 1]), {"pixel_values": images}))
