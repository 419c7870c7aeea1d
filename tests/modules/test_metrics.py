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


def test_in_evaluation_a_batch_that_is_not_finite_counts_as_wrong() -> None:
    metrics = EpochMetrics(skips=False)
    metrics.update(torch.tensor(2.0), torch.eye(2), torch.tensor([0, 1]))
    nan = torch.full((2, 2), float("nan"))
    metrics.update(nan.mean(), nan, torch.tensor([0, 0]))  # where argmax is 0, too
    means = metrics.compute_and_reset()
    assert not means["loss"].isfinite()
    assert means["accuracy"].item() == 0.5


def test_an_epoch_begins_anew() -> None:
    metrics = EpochMetrics()
    for loss in (1.0, 3.0):
        metrics.update(torch.tensor(loss), torch.eye(2), torch.tensor([0, 1]))
        assert metrics.compute_and_reset()["loss"].item() == loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_means_of_many_examples_in_any_precision(dtype: torch.dtype) -> None:
    """Every third of 90 000 is right; sums in half precision stay where they are long before."""
    metrics = EpochMetrics().to(dtype)
    logits, labels = torch.eye(3, dtype=dtype).repeat(100, 1), torch.tensor([0, 0, 0]).repeat(100)
    for _ in range(300):
        metrics.update(torch.tensor(0.5, dtype=dtype), logits, labels)
    means = metrics.compute_and_reset()
    assert means["loss"].item() == 0.5
    assert means["accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_restored_sum_is_not_rounded(dtype: torch.dtype) -> None:
    """Lightning brings a module into its precision after it has restored it."""
    saved, restored = EpochMetrics(), EpochMetrics()
    saved.update(torch.tensor(1 / 3), torch.eye(3).repeat(1001, 1), torch.zeros(3003).long())
    restored.load_state_dict(saved.state_dict())
    assert restored.to(dtype).compute_and_reset() == saved.compute_and_reset()
