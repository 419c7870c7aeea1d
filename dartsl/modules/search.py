"""The search: Algorithm 1 of arXiv:1806.09055 as a LightningModule.

Shapes: B images, E edges, P primitives, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from dartsl.distributed import average, check_replicas
from dartsl.errors import UserError
from dartsl.genotype import Genotype, count_skips
from dartsl.hypergradient import (
    BilevelProblem,
    Hypergradient,
    Unrolled,
    check_virtual_step,
    held_constant,
    sgd_direction,
)
from dartsl.modules.resumable import (
    Batch,
    OptimizerFactory,
    ResumableModule,
    Schedule,
    check_gradient_clip,
    make_optimizer,
)
from dartsl.networks import Supernet


class Stages(Protocol):
    """How supernet and schedule change during a search."""

    def enter(self, module: "SearchModule", epoch: int) -> None:
        """Put `module` into the state of `epoch`; called before every batch of it.

        And once more where a run goes on behind an epoch's last batch, for its validation: so the
        state is a function of the epoch, not of how often this was called.
        """


class SearchModule(ResumableModule):
    """Alternates alpha steps on validation batches and weight steps on training batches.

    A training batch is `{"train": (x, y), "val": (x, y)}`, x [B, C, H, W] and y [B]. The official
    number of running-statistics updates a step comes out by itself: two in first order, four with
    the finite difference (those of the virtual weights are undone).

    Args:
        supernet: what is searched.
        hypergradient: the gradient of alpha; xi is the weight optimizer's learning rate when
            `training_step` begins.
        weight_optimizer: partial over the list of weights (SGD in the paper).
        arch_optimizer: partial over the list of alphas (Adam in the paper).
        schedule: epoch -> learning rate of the weights; None leaves it alone.
        gradient_clip: norm to which the gradients of the weights (not of alpha) are clipped.
        penalty: a scalar term of the loss that alpha descends, as a function of the supernet, for
            example of its `edge_weights()` (what `strengths()` gives has no gradients).
        selection: how a genotype is read from the supernet.
        stages: how supernet and schedule change during the search.

    Attributes:
        updates_alpha: whether alpha steps are taken; `stages` may switch them off for a warm-up.

    Raises:
        UserError: for a gradient_clip that is not above 0, and in `configure_optimizers` for a
            weight optimizer whose step `Unrolled` does not know.
    """

    def __init__(
        self,
        supernet: Supernet,
        hypergradient: Hypergradient,
        weight_optimizer: OptimizerFactory,
        arch_optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        gradient_clip: float = 5.0,
        *,
        penalty: Callable[[Supernet], Tensor] | None = None,
        selection: Callable[[Supernet], Genotype] = Supernet.genotype,
        stages: Stages | None = None,
    ) -> None:
        super().__init__(schedule)
        check_gradient_clip(gradient_clip)
        self.automatic_optimization = False
        self.supernet = supernet
        self.hypergradient = hypergradient
        self.weight_optimizer = weight_optimizer
        self.arch_optimizer = arch_optimizer
        self.gradient_clip = gradient_clip
        self.penalty = penalty
        self.selection = selection
        self.stages = stages
        self.updates_alpha = True

    def operations(self) -> str:
        """The primitives, in the order of alpha's columns."""
        return f"the primitives {', '.join(self.supernet.space.primitives)}"

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """One step of Algorithm 1."""
        # 1. Update alpha by descending grad_alpha L_val(w - xi grad_w L_train(w, alpha), alpha)
        if self.updates_alpha:
            self.alpha_step(batch["train"], batch["val"])
        # 2. Update weights w by descending grad_w L_train(w, alpha)
        return self.weight_step(batch["train"])

    def alpha_step(self, train: Batch, val: Batch) -> None:
        """Line 1 of Algorithm 1."""
        optimizer, steps = self.trainer.optimizers[1], self.finite_steps[1]
        optimizer.zero_grad()  # a hypergradient may add to what it finds
        gradients = self.hypergradient(self.bilevel_problem(train, val))
        check_gradients(gradients, steps.parameters)
        for alpha, gradient in zip(steps.parameters, gradients, strict=True):
            if alpha.requires_grad:  # what a stage has frozen is passed by, its weight decay too
                alpha.grad = torch.empty_like(alpha).copy_(gradient)  # as fused optimizers need it
        self.tell_scaler(optimizer)
        steps.admit()
        # Not through Lightning's wrapper: one batch is one global_step.
        optimizer.step()

    def weight_step(self, train: Batch) -> Tensor:
        """Line 2 of Algorithm 1, with clipped gradients."""
        x, y = train
        optimizer = cast(list[LightningOptimizer], self.optimizers())[0]
        optimizer.zero_grad()
        with held_constant(self.supernet.arch_parameters()):
            loss, logits = self.loss(x, y)
            self.manual_backward(loss * self.share(y))
        optimizer.step()  # which calls on_before_optimizer_step
        self.train_metrics.update(loss, logits, y)
        self.log("search/train_loss_step", loss.detach())
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of the weights, which here are unscaled also under float16."""
        steps = self.finite_steps[0]
        steps.admit(nn.utils.clip_grad_norm_(steps.parameters, self.gradient_clip))

    def bilevel_problem(self, train: Batch, val: Batch) -> BilevelProblem:
        """What the hypergradient sees of this step."""
        weight_optimizer = self.trainer.optimizers[0]
        scale = self.loss_scale()
        train_share, val_share = self.share(train[1]), self.share(val[1])

        def scaled(loss: Tensor) -> Tensor:
            return loss if scale is None else loss * scale

        def unscaled_average(gradients: Sequence[Tensor]) -> list[Tensor]:
            means = average(gradients)
            return means if scale is None else list(torch._foreach_div(means, scale))

        def val_loss() -> Tensor:
            loss = self.loss(*val)[0] * val_share
            return scaled(loss if self.penalty is None else loss + self.penalty(self.supernet))

        return BilevelProblem(
            train_loss=lambda: scaled(self.loss(*train)[0] * train_share),
            val_loss=val_loss,
            # Not the supernet's word: a walk through its modules takes milliseconds.
            weights=self.finite_steps[0].parameters,
            alphas=self.finite_steps[1].parameters,
            xi=weight_optimizer.param_groups[0]["lr"],
            virtual_direction=lambda gradients: sgd_direction(weight_optimizer, gradients),
            buffers=lambda: list(self.supernet.buffers()),
            average=unscaled_average,
            may_overflow=scale is not None,
        )

    def scaler(self) -> torch.amp.GradScaler | None:
        """Under 16-mixed, what keeps small gradients from vanishing in float16."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def loss_scale(self) -> Tensor | None:
        """The scaler's factor; None where there is no scaler."""
        scaler = self.scaler()
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def tell_scaler(self, optimizer: torch.optim.Optimizer) -> None:
        """Let gradients of alpha that have overflowed lower the scale, as those of weights do.

        A scaler looks for them where it unscales, so they are scaled for it.
        """
        scaler = self.scaler()
        if scaler is not None:
            for alpha in self.finite_steps[1].parameters:
                alpha.grad = None if alpha.grad is None else scaler.scale(alpha.grad)
            scaler.unscale_(optimizer)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy and the logits [B, K]."""
        # Autocast keeps half-precision copies of the weights, which move within a step.
        torch.clear_autocast_cache()
        logits = self.supernet(x)
        return F.cross_entropy(logits, y), logits

    def genotype(self) -> Genotype:
        """The genotype that the search would end with now."""
        return self.selection(self.supernet)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizer of the weights, then the one of alpha; neither has what is frozen."""
        weights, alphas = (
            [parameter for parameter in parameters if parameter.requires_grad]
            for parameters in (self.supernet.weight_parameters(), self.supernet.arch_parameters())
        )
        of_weights = make_optimizer(self.weight_optimizer, weights, "the weights")
        if isinstance(self.hypergradient, Unrolled):
            check_virtual_step(of_weights)
        return [of_weights, make_optimizer(self.arch_optimizer, alphas, "alpha")]

    def on_train_start(self) -> None:
        """Enter the stage of what a resumed run does before its next batch."""
        if self._batch_end_pending:
            self.enter_stage()
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Enter the epoch's stage and learning rate.

        Raises:
            UserError: for batches of one half alone.
        """
        if not isinstance(batch, Mapping) or not {"train", "val"} <= set(batch):
            raise UserError(
                'A search takes batches {"train": (x, y), "val": (x, y)}: those of a data module '
                'are so with task="search".'
            )
        self.enter_stage()
        super().on_train_batch_start(batch, batch_idx)

    def enter_stage(self) -> None:
        """Put supernet and schedule into the state of the epoch."""
        if self.stages is not None:
            self.stages.enter(self, self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check at an epoch's end, before a genotype is written, that the processes agree."""
        if self.epoch_is_complete():
            self.check_finite()
            check_replicas(self.supernet.arch_parameters(), "alphas")
            check_replicas(self.supernet.weight_parameters(), "weights")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on the half that alpha is searched on."""
        x, y = batch
        loss, logits = self.loss(x, y)
        self.val_metrics.update(loss, logits, y)

    def on_validation_epoch_end(self) -> None:
        """Log the alpha half's loss and accuracy."""
        self.log_epoch("search/val_", self.val_metrics.compute_and_reset())

    def on_train_epoch_end(self) -> None:
        """Log the weight half's loss and accuracy, the learning rate and the state of alpha."""
        if not self.epoch_is_complete():
            return
        self.log_epoch("search/train_", self.train_metrics.compute_and_reset())
        self.log_epoch("search/", {"learning_rate": self.weight_optimizer_groups()[0]["lr"]})
        weights, alpha = self.finite_steps
        self.log_epoch("search/skipped_", {"weight_steps": weights.skipped.float()})
        self.log_epoch("search/skipped_", {"alpha_steps": alpha.skipped.float()})
        genotype = self.genotype()
        for kind, strengths in self.supernet.strengths().items():
            skips = count_skips(getattr(genotype, kind))
            self.log_epoch(f"alpha/{kind}_", {"entropy": edge_entropies(strengths).mean()})
            self.log_epoch(f"alpha/{kind}_", {"skip_connections": float(skips)})


def check_gradients(gradients: Sequence[Any], alphas: Sequence[Tensor]) -> None:
    """Raise a UserError where a hypergradient gives anything but a gradient for each alpha."""
    found = [list(g.shape) if isinstance(g, Tensor) else repr(g) for g in gradients]
    expected = [list(alpha.shape) for alpha in alphas]
    if found != expected:
        raise UserError(
            f"The hypergradient gives {', '.join(map(str, found)) or 'nothing'} for gradients; it "
            f"gives one for each alpha, {', '.join(map(str, expected))}."
        )


def edge_entropies(strengths: Tensor) -> Tensor:
    """Entropy [E] of each edge's weights in nats, of strengths [E, P]; log P when undecided.

    Strengths of at most 0, which a relaxation of one's own may give, weigh nothing.
    """
    share = strengths.clamp_min(0)
    share = share / share.sum(dim=1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    return torch.special.entr(share).sum(dim=1)
