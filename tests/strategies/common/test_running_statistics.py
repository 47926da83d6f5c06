"""Running statistics of batch norms: undone with a skipped step, and the mean over ranks."""

import torch
from torch import nn

from strategies.common.running_statistics import RunningStatistics


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.LayerNorm(4), nn.BatchNorm2d(3, affine=False))


def test_a_step_that_overflows_leaves_no_trace():
    model = net()
    model(torch.randn(4, 1, 6, 6))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    statistics = RunningStatistics(model)
    statistics.keep()
    model(torch.full((4, 1, 6, 6), float("inf")))
    assert not all(buffer.isfinite().all() for buffer in model.buffers())
    statistics.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_mean_over_ranks_is_the_same_at_each_step_and_at_the_end():
    """Two ranks with the same weights and other rows, averaged after each of three steps or after the last one."""
    rows = torch.randn(2, 3, 4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    ends = []
    for every in (1, 3):
        ranks = [net(), net()]
        for step in range(3):
            for rank, model in enumerate(ranks):
                model(rows[rank, step])
            if (step + 1) % every == 0:
                halves = []
                for model in ranks:  # what each rank hands in
                    RunningStatistics(model).average(lambda own, halves=halves: halves.append(own) or own * 2, 2)
                for model in ranks:
                    RunningStatistics(model).average(lambda own, halves=halves: sum(halves), 2)
        ends.append([dict(model.named_buffers()) for model in ranks])
    for name, buffer in ends[0][0].items():
        torch.testing.assert_close(buffer, ends[0][1][name])
        torch.testing.assert_close(buffer, ends[1][0][name])
    assert ends[0][0]["1.num_batches_tracked"] == 3
