"""What both LightningModules need so that a run resumed at any batch ends as if never stopped.

* Every random number of a step is a function of (seed, step).
* The learning rate is a function of the epoch, set before each batch.
* Epoch metrics are part of the state_dict.
* What a checkpoint holds in float64 is restored in float64.
* A checkpoint saved on a batch still runs the validation that is due after it, and on an epoch's
  last batch that epoch's end; one saved where max_steps ended a run within an epoch goes on with
  that epoch.
* A checkpoint of another network ends in one sentence.

And a step whose gradients are not finite is skipped; a run of such steps ends.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import SumMetric

from dartsl.distributed import average_gradients, broadcast, gather, share_of, world_size
from dartsl.errors import UserError
from dartsl.modules.finite import FiniteSteps, mend_statistics

Schedule = Callable[[int], float]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]  # images [B, C, H, W], labels [B]


class EpochMetrics(nn.Module):
    """Mean loss and accuracy over the examples of an epoch, kept in the state_dict.

    Sums are of float32 in a module of any precision: those of half precision soon stop to grow.

    Args:
        skips: whether batches whose loss is not finite are left out, as their steps are. Otherwise
            all count, the mean loss is not finite either, and logits that are not finite are wrong.
    """

    def __init__(self, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        # Sums, not torchmetrics' MeanMetric: its search for NaN makes a GPU wait at every step, and
        # where that is disabled it ignores the weights (torchmetrics 1.9).
        self.loss, self.correct, self.count = (SumMetric(nan_strategy="disable") for _ in range(3))
        for metric in self.children():
            cast(SumMetric, metric).persistent(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Go along to a device, but into no precision; what was restored would be rounded, too.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, logits [B, K] and labels [B]."""
        loss = loss.detach()
        counts = loss.isfinite() if self.skips else torch.ones_like(loss, dtype=torch.bool)
        highest, predicted = logits.max(1)
        correct = (predicted == labels) & highest.isfinite()
        count = len(labels) * counts.float()
        self.loss.update(torch.where(counts, loss, 0.0) * count)
        self.correct.update(correct.sum() * counts)
        self.count.update(count)

    def compute_and_reset(self) -> dict[str, Tensor]:
        """The means "loss" and "accuracy" since the last reset."""
        loss, correct, count = (self._sum(m) for m in (self.loss, self.correct, self.count))
        return {"loss": loss / count, "accuracy": correct / count}

    def reset(self) -> None:
        """Forget what was counted."""
        for metric in (self.loss, self.correct, self.count):
            metric.reset()

    @staticmethod
    def _sum(metric: SumMetric) -> Tensor:
        # A resumed metric has its state but not its count of updates; do not warn of it.
        metric._update_count = max(metric._update_count, 1)
        value: Tensor = metric.compute()
        metric.reset()
        return value


class ResumableModule(pl.LightningModule):
    """A LightningModule with a schedule over epochs, whose runs resume exactly.

    Args:
        schedule: epoch -> learning rate of the weights; None leaves the optimizer's alone.
    """

    def __init__(self, schedule: Schedule | None) -> None:
        super().__init__()
        self.schedule = schedule
        self.train_metrics = EpochMetrics()
        self.val_metrics = EpochMetrics(skips=False)
        self.step_seed: int | None = None
        self.finite_steps: list[FiniteSteps] = []  # of every optimizer, in their order
        self._checkpoint: dict[str, Any] | None = None  # what on_fit_start takes from it
        self._batch_end_pending = False

    def setup(self, stage: str) -> None:
        """Take the run's precision; Lightning does so only after it has restored a checkpoint."""
        self.trainer.precision_plugin.convert_module(self)

    def weight_optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer that the schedule sets."""
        return self.trainer.optimizers[0].param_groups

    def operations(self) -> str:
        """What the network's tensors do not tell: which operations they belong to."""
        return ""

    def num_epochs(self) -> int | None:
        """Epochs of the run, from max_epochs or else from max_steps; None where neither says."""
        trainer = self.trainer
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            return trainer.max_epochs
        if trainer.max_steps < 0 or math.isinf(trainer.num_training_batches):
            return None
        return max(1, math.ceil(trainer.max_steps / trainer.num_training_batches))

    def is_of_epoch(self, name: str, epoch: int) -> bool:
        """Whether a logged number is of this epoch; those of a validation stay until the next."""
        every = self.trainer.check_val_every_n_epoch
        return "/val_" not in name or every is None or (epoch + 1) % every == 0

    def epoch_is_complete(self) -> bool:
        """Whether every batch of the epoch was trained on (not so when max_steps ends a run)."""
        return self.trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def validation_is_due(self) -> bool:
        """Whether a validation follows the batch in hand."""
        fit_loop = self.trainer.fit_loop
        fetcher = fit_loop._data_fetcher
        return fetcher is not None and fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def on_fit_start(self) -> None:
        """Take the seed of all steps from the global one, once in a run's life; take up counts.

        Raises:
            UserError: for gradients of several batches.
        """
        check_accumulation(self.trainer.accumulate_grad_batches)
        if self.step_seed is None:
            self.step_seed = torch.initial_seed() % 2**31
        self.finite_steps = [FiniteSteps(optimizer) for optimizer in self.trainer.optimizers]
        if self._checkpoint is None:
            self.train_metrics.reset()  # of an epoch that another fit has not ended
            return
        counts = self._checkpoint.get("skipped_steps", [])
        for steps, state in zip(self.finite_steps, counts, strict=False):
            steps.load_state_dict(state)
        # Of a run that had ended they are its result.
        self.trainer.callback_metrics.update(self._checkpoint.get("metrics", {}))
        self._checkpoint = None

    def on_train_start(self) -> None:
        """Go straight to an epoch's end where a checkpoint was saved on its last batch."""
        at_epoch_end = self._batch_end_pending and self.epoch_is_complete()
        if at_epoch_end and not self.validation_is_due():
            # Without a validation to go back to, Lightning would train on one more batch instead.
            data_fetcher = self.trainer.fit_loop._data_fetcher
            assert data_fetcher is not None
            data_fetcher.done = True
            self.trainer.fit_loop.epoch_loop._batches_that_stepped += 1  # x axis of what is logged
        self._batch_end_pending = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the epoch's learning rate, and the seed of this step's random numbers."""
        if self.schedule is not None:
            for group in self.weight_optimizer_groups():
                group["lr"] = self.schedule(self.current_epoch)
        assert self.step_seed is not None
        rank_and_step = (self.global_rank << 40) + self.global_step
        torch.manual_seed((self.step_seed * 2**31 + rank_and_step) & (2**63 - 1))

    def share(self, y: Tensor) -> Tensor | float:
        """What a loss over these labels weighs in the mean over all processes."""
        return share_of(len(y), y.device)

    def on_after_backward(self) -> None:
        """Average the gradients over all processes, before they are unscaled and clipped."""
        average_gradients(self.parameters())

    def log_epoch(self, prefix: str, values: Mapping[str, Tensor | float]) -> None:
        """Log an epoch's values, the same in all processes, as `<prefix><name>`."""
        self.log_dict({f"{prefix}{name}": v for name, v in values.items()}, sync_dist=True)

    def check_finite(self) -> None:
        """Stop where there is nothing left to go on with; a GPU waits here.

        Raises:
            UserError: where too many steps were skipped, or a weight is not finite.
        """
        for steps, what in zip(self.finite_steps, ("the weights", "alpha"), strict=False):
            steps.check(what)
        with torch.no_grad():
            finite = nn.utils.get_total_norm(list(self.parameters())).isfinite()
        if not finite:
            raise UserError(
                "The weights are no longer finite: the run has diverged. Its last checkpoint is "
                "kept. Try a lower learning rate (optimizer.weights.lr)."
            )

    def on_validation_start(self) -> None:
        """Validate with the running statistics of rank 0, which a checkpoint keeps."""
        self.val_metrics.reset()  # of a validation that was broken off
        mend_statistics(self)
        broadcast(self.buffers())

    def on_test_start(self) -> None:
        """Test with the running statistics of rank 0."""
        self.on_validation_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the steps' seed and counts, what was logged, and the metrics of all processes."""
        checkpoint["operations"] = self.operations()
        checkpoint["validation_is_due"] = self.validation_is_due()
        checkpoint["step_seed"] = self.step_seed
        checkpoint["skipped_steps"] = [steps.state_dict() for steps in self.finite_steps]
        logged = sorted(self.trainer.callback_metrics.items())
        checkpoint["metrics"] = {  # but not what the machine took
            name: value.cpu() for name, value in logged if not name.startswith("system/")
        }
        metrics = self.epoch_metrics(checkpoint)
        parts = gather(list(metrics.values()))
        checkpoint["epoch_metrics"] = [dict(zip(metrics, part, strict=True)) for part in parts]
        sums = [torch.stack(values).sum(0) for values in zip(*parts, strict=True)]
        checkpoint["state_dict"].update(zip(metrics, sums, strict=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and mend Lightning's record of where it was saved.

        But for a fit that goes on with it, of a checkpoint the weights alone count.

        Raises:
            UserError: for a checkpoint of another network.
        """
        check_same_tensors(self.state_dict(), checkpoint["state_dict"], "this run's network")
        check_same_operations(self.operations(), checkpoint)
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        self.step_seed = checkpoint.get("step_seed")
        self._checkpoint = {
            k: checkpoint[k] for k in ("skipped_steps", "metrics") if k in checkpoint
        }
        parts = checkpoint.get("epoch_metrics", [])
        if len(parts) == world_size():  # or sums would be rounded in another order
            checkpoint["state_dict"].update(parts[self.global_rank])
        elif self.global_rank > 0:  # rank 0 goes on with the metrics of all
            for name, value in self.epoch_metrics(checkpoint).items():
                checkpoint["state_dict"][name] = torch.zeros_like(value)
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is not None:
            reopen_epoch(loops)
            validates = checkpoint.get("validation_is_due", False)
            self._batch_end_pending = mark_batch_end_as_pending(loops, validates)

    def epoch_metrics(self, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        """The states of the metrics in a checkpoint, which are sums over examples."""
        prefixes = tuple(
            f"{name}." for name, module in self.named_modules() if isinstance(module, EpochMetrics)
        )
        return {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefixes)}


def make_optimizer(
    factory: OptimizerFactory, parameters: list[nn.Parameter], name: str
) -> torch.optim.Optimizer:
    """The optimizer of some parameters; on a GPU one kernel updates them all, where there is one.

    Raises:
        UserError: where it refuses its settings; says whose optimizer it is by `name`.
    """
    try:
        optimizer = factory(parameters)
        for group in optimizer.param_groups:
            undecided = group.get("fused", False) is None and group.get("foreach") is None
            if undecided and all(parameter.is_cuda for parameter in group["params"]):
                group["fused"] = True  # whose skipped steps the host need not know of
        return optimizer
    except (TypeError, ValueError) as error:
        raise UserError(f"The optimizer of {name} refuses its settings: {error}.") from error


def check_accumulation(accumulate_grad_batches: int | None) -> None:
    """Raise a UserError for gradients of several batches, which no checkpoint keeps."""
    if accumulate_grad_batches not in (None, 1):
        raise UserError(
            "trainer.accumulate_grad_batches is not for searches and trainings that resume "
            "exactly: set data.batch_size, or share a batch among processes (hardware=multi_gpu)."
        )


def check_gradient_clip(value: float) -> None:
    """Raise a UserError for a norm that gradients cannot be clipped to."""
    if not value > 0:
        raise UserError(f"gradient_clip={value} must be above 0; .inf does not clip.")


def check_same_tensors(
    expected: dict[str, Tensor], found: dict[str, Tensor], expected_name: str
) -> None:
    """Raise a UserError that names the first differences of two state dicts, if there are any."""
    missing = [key for key in expected if key not in found]
    surplus = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if not missing and not surplus and not shapes:
        return
    differences = [
        f"{len(keys)} {what} (e.g. {keys[0]})"
        for keys, what in (
            (missing, "tensors missing"),
            (surplus, "tensors too many"),
            (shapes, "of another shape"),
        )
        if keys
    ]
    raise UserError(
        f"The checkpoint is of another network than {expected_name}: {'; '.join(differences)}. "
        "Give the same genotype, channels, cells and classes as the run that saved it."
    )


def check_same_operations(expected: str, checkpoint: Mapping[str, Any]) -> None:
    """Raise a UserError for a network with equal tensors that computes something else."""
    found = checkpoint.get("operations", expected)  # older ones lack it
    if found != expected:
        raise UserError(
            f"The checkpoint is of another network than this run's, though its tensors fit: it has "
            f"{found}. Give the same genotype or search space as the run that saved it."
        )


def reopen_epoch(loops: dict[str, Any]) -> None:
    """Take back the end of an epoch that was none, because max_steps cut the epoch short.

    Lightning would begin the next epoch instead. The record written here is that of a checkpoint
    saved in `on_train_batch_end` of the last batch trained.

    Args:
        loops: the fit loop's state in a checkpoint; changed in place.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    ended = epochs["current"]["processed"] == epochs["current"]["ready"]
    if not ended or batches["is_last_batch"] or batches["current"]["processed"] == 0:
        return
    for part in ("total", "current"):
        epochs[part]["processed"] -= 1
        epochs[part]["completed"] = epochs[part]["processed"]
        batches[part]["completed"] = batches[part]["processed"] - 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def mark_batch_end_as_pending(loops: dict[str, Any], validation_is_due: bool) -> bool:
    """Make Lightning do what follows a batch in whose `on_train_batch_end` a checkpoint was saved.

    Lightning takes the validation that is due there for done, and an epoch of which it was the last
    batch for finished. In the record written here the batch is trained and a validation has been
    begun, of which it goes back to the first batch.

    Args:
        loops: the fit loop's state in a checkpoint; changed in place.
        validation_is_due: after the batch; not needed at an epoch's end.

    Returns:
        Whether there is anything that follows.
    """
    batches = loops["epoch_loop.batch_progress"]
    total = batches["total"]
    in_batch_end = total["processed"] == total["ready"] == total["completed"] + 1
    if not (in_batch_end and (batches["is_last_batch"] or validation_is_due)):
        return False
    for count in (batches["total"], batches["current"]):
        count["completed"] = count["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validation["total"], validation["current"]):
        count.update(ready=1, started=1, processed=0, completed=0)
    validation["is_last_batch"] = False
    return True
