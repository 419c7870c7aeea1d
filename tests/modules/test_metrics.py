"""The means of an epoch: over its examples, whatever the sizes of its batches."""

import pytest
import torch

from dartsl.modules.resumable import EpochMetrics


def test_means_are_over_examples_not_batches() -> None:
    metrics = EpochMetrics()
    logits = torch.eye(3)
    metrics.update(torch.tensor(1.0), logits, torch.tensor([0, 1, 2]))
    metrics.update(torch.tensor(5.0), logits[:1], torch.tensor([1]))
    means = metrics.compute_and_reset()
    assert means["loss"].item() == pytest.approx((3 * 1.0 + 1 * 5.0) / 4)
    assert means["accuracy"].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_counts_for_nothing(loss: float) -> None:
    metrics = EpochMetrics()
    metrics.update(torch.tensor(2.0), torch.eye(2), torch.tensor([0, 0]))
    metrics.update(torch.tensor(loss), torch.eye(2), torch.tensor([0, 1]))
    means = metrics.compute_and_reset()
    assert means["loss"].item() == 2.0
    assert means["accuracy"].item() == 0.5


def test_an_epoch_begins_anew() -> None:
    metrics = EpochMetrics()
    for loss in (1.0, 3.0):
        metrics.update(torch.tensor(loss), torch.eye(2), torch.tensor([0, 1]))
        assert metrics.compute_and_reset()["loss"].item() == loss
