"""Running statistics follow at once or together, to the same numbers."""

from contextlib import suppress

import torch
from torch import nn

from dartsl.batch_norm import count, follow, following_together


def test_within_following_together_they_follow_at_its_end() -> None:
    running = [torch.zeros(3), torch.ones(3), torch.zeros(2, 3)]
    batch = [torch.ones(3), torch.full((3,), 3.0), torch.ones(3).expand(2, 3)]
    alone = [tensor.clone() for tensor in running]
    for momentum in (0.1, 0.5):
        follow(alone, batch, momentum)
    with following_together():
        for momentum in (0.1, 0.5):
            follow(running[:2], batch[:2], momentum)
            follow(running[2:], batch[2:], momentum)
        assert not running[0].any()  # not yet
    for one, other in zip(running, alone, strict=True):
        assert torch.equal(one, other)
    follow(running[:1], batch[:1], 1.0)
    assert torch.equal(running[0], batch[0])  # at once again


def test_a_pass_that_fails_moves_nothing() -> None:
    running = torch.zeros(2)
    with suppress(ValueError), following_together():
        follow([running], [torch.ones(2)], 0.1)
        raise ValueError("in between")
    assert not running.any()
    follow([running], [torch.ones(2)], 1.0)
    assert running.all()


def test_batches_are_counted_at_once_or_at_the_end() -> None:
    norm, uncounted = nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)
    for each in (norm, uncounted, nn.Identity()):
        count(each)
    assert norm.num_batches_tracked == 1
    with following_together():
        count(norm)
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 2
