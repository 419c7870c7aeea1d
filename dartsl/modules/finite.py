"""A step whose gradients are not finite is skipped and counted; too many in a row end the run."""

import torch
from torch import Tensor, nn

from dartsl.errors import UserError

MAX_SKIPPED_IN_A_ROW = 50  # float16 begins with about ten, until its scale is low enough


class FiniteSteps:
    """Lets an optimizer's finite steps through, and counts the others.

    A fused optimizer passes such a step by on the device; on a GPU ours are. For another one the
    host asks, which costs nothing on a CPU and makes a GPU wait for the gradients once; to select
    weights and buffers on the GPU tensor by tensor would take longer.

    Args:
        optimizer: whose steps they are.

    Attributes:
        parameters: what the optimizer moves.
        skipped: their number since the run began.
        in_a_row: the number of the last ones, 0 where the last step was finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        counts = torch.zeros(2, dtype=torch.long, device=self.parameters[0].device)
        self.skipped, self.in_a_row = counts.unbind()
        if self.is_fused():
            prepare_fused(optimizer)

    def is_fused(self) -> bool:
        """Whether one kernel updates all parameters; a checkpoint may bring another answer."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

    @torch.no_grad()
    def admit(self, norm: Tensor | None = None) -> None:
        """Make the step that follows change nothing where a gradient is not finite.

        Args:
            norm: of all gradients, where it is known already.
        """
        if norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = ~norm.isfinite().to(self.skipped.device)
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        if self.is_fused():
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            self.optimizer.zero_grad()  # parameters without a gradient are passed by

    def check(self, what: str) -> None:
        """Stop a run of which nothing can come any more; reads the count from the device.

        Raises:
            UserError: where the last `MAX_SKIPPED_IN_A_ROW` steps were all skipped.
        """
        number = int(self.in_a_row)
        if number >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"The gradients of {what} were not finite in the last {number} steps, which were "
                "skipped: the run has diverged. Its last checkpoint, if any, is kept. Try a lower "
                "learning rate (optimizer.weights.lr), or trainer.precision=32-true."
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped.fill_(state["skipped"])
        self.in_a_row.fill_(state["in_a_row"])


def prepare_fused(optimizer: torch.optim.Optimizer) -> None:
    """Take unscaling and skipping from a fused optimizer, and give it buffers to begin with."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        if group.get("momentum") and not group.get("dampening"):
            for parameter in group["params"]:
                # Where the first step is skipped, its kernel would leave them as allocated.
                state = optimizer.state[parameter]
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))


@torch.no_grad()
def mend_statistics(module: nn.Module) -> None:
    """Let running statistics that are not finite begin anew: a skipped step has passed them too."""
    for name, buffer in module.named_buffers():
        start = {"running_mean": 0.0, "running_var": 1.0}.get(name.rpartition(".")[2])
        if start is not None:
            buffer.copy_(torch.where(buffer.isfinite(), buffer, start))
