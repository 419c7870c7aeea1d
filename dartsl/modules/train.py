"""The training of a final network from scratch (section 3.1.2, 3.3 of arXiv:1806.09055).

Shapes: B images, K classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.distributed import check_replicas
from dartsl.errors import UserError
from dartsl.modules.resumable import (
    Batch,
    OptimizerFactory,
    ResumableModule,
    Schedule,
    check_gradient_clip,
    make_optimizer,
)
from dartsl.networks import FinalNetwork


class TrainModule(ResumableModule):
    """Trains a final network: cross entropy plus the auxiliary head's, with scheduled drop path.

    Args:
        network: what is trained.
        optimizer: partial over the list of parameters (SGD in the paper).
        schedule: epoch -> learning rate; None leaves it alone.
        auxiliary_weight: of the auxiliary head's loss, 0.4 in the paper.
        drop_path_prob: reached linearly, drop_path_prob * epoch / epochs (0.2 on CIFAR).
        label_smoothing: of the training losses (0.1 on ImageNet).
        gradient_clip: norm to which the gradients are clipped.

    Raises:
        UserError: for a value out of its range.
    """

    def __init__(
        self,
        network: FinalNetwork,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        auxiliary_weight: float = 0.4,
        drop_path_prob: float = 0.2,
        label_smoothing: float = 0.0,
        gradient_clip: float = 5.0,
    ) -> None:
        super().__init__(schedule)
        check_gradient_clip(gradient_clip)
        for name, value in (
            ("drop_path_prob", drop_path_prob),
            ("label_smoothing", label_smoothing),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} must be from 0 to 1.")
        if not 0 <= auxiliary_weight < math.inf:
            raise UserError(f"auxiliary_weight={auxiliary_weight} must be a number of at least 0.")
        self.network = network
        self.optimizer = optimizer
        self.auxiliary_weight = auxiliary_weight
        self.drop_path_prob = drop_path_prob
        self.label_smoothing = label_smoothing
        self.gradient_clip = gradient_clip

    def operations(self) -> str:
        """The genotype, in the official notation."""
        return self.network.genotype.notation()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, x [B, C, H, W] and y [B]."""
        x, y = batch
        logits, auxiliary_logits = self.network(x)
        loss = self.loss(logits, y)
        self.train_metrics.update(loss, logits, y)
        if auxiliary_logits is not None:
            loss = loss + self.auxiliary_weight * self.loss(auxiliary_logits, y)
        self.log("train/loss_step", loss.detach())
        return loss * self.share(y)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        logits: Tensor = self.network(x)[0]
        return logits

    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Logits [B, K] of a batch, x or (x, y), for `trainer.predict`."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy with label smoothing."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of all parameters."""
        return make_optimizer(self.optimizer, list(self.network.parameters()), "the weights")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to this module's norm; a value given to the Trainer comes first."""
        value = self.gradient_clip if gradient_clip_val is None else gradient_clip_val
        steps, algorithm = self.finite_steps[0], gradient_clip_algorithm or "norm"
        if algorithm == "norm" and value > 0:
            # As Lightning does, which does not tell the norm: of so many tensors it takes long.
            steps.admit(nn.utils.clip_grad_norm_(steps.parameters, value))
        else:
            steps.admit()
            self.clip_gradients(optimizer, value, algorithm)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the epoch's learning rate and drop path.

        Raises:
            UserError: for batches of a search.
        """
        if isinstance(batch, Mapping):
            raise UserError(
                f"A training takes batches (x, y), not {{{', '.join(map(repr, batch))}}}: those of "
                'a data module are so with task="train".'
            )
        super().on_train_batch_start(batch, batch_idx)
        self.network.drop_path_prob = self.epoch_drop_path_prob()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check at an epoch's end that the processes agree."""
        if self.epoch_is_complete():
            self.check_finite()
            check_replicas(self.network.parameters(), "weights")

    def epoch_drop_path_prob(self) -> float:
        """Drop path's probability in this epoch.

        Raises:
            UserError: where it grows for an unknown number of epochs.
        """
        if self.drop_path_prob == 0:
            return 0.0
        epochs = self.num_epochs()
        if epochs is None:
            raise UserError(
                "Drop path grows until the last epoch, which nothing names: set "
                "trainer.max_epochs, or max_steps where the batches of an epoch can be counted, "
                "or module.drop_path_prob=0."
            )
        return self.drop_path_prob * self.current_epoch / epochs

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy in evaluation mode."""
        x, y = batch
        logits, _ = self.network(x)
        self.val_metrics.update(F.cross_entropy(logits, y), logits, y)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy in evaluation mode."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss and accuracy."""
        self.log_epoch("train/val_", self.val_metrics.compute_and_reset())

    def on_test_epoch_end(self) -> None:
        """Log the test loss and accuracy."""
        self.log_epoch("test/", self.val_metrics.compute_and_reset())

    def on_train_epoch_end(self) -> None:
        """Log the training loss and accuracy, the learning rate and drop path."""
        if not self.epoch_is_complete():
            return
        self.log_epoch("train/train_", self.train_metrics.compute_and_reset())
        self.log_epoch("train/", {"learning_rate": self.weight_optimizer_groups()[0]["lr"]})
        self.log_epoch("train/", {"drop_path_prob": self.epoch_drop_path_prob()})
        self.log_epoch("train/", {"skipped_steps": self.finite_steps[0].skipped.float()})
