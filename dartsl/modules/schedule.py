"""Learning rates as functions of the epoch, so that no scheduler has a state to resume."""

import math

from dartsl.errors import UserError


def cosine(epoch: int, initial: float, final: float, num_epochs: int) -> float:
    """Cosine annealing (section 3.1.1): `initial` at epoch 0, `final` at `num_epochs`.

    Raises:
        UserError: for less than one epoch, and for rates that are no finite numbers of at least 0.
    """
    if num_epochs < 1:
        raise UserError(f"optimizer.schedule.num_epochs={num_epochs} must be at least 1.")
    _check(initial=initial, final=final)
    return final + (initial - final) * (1 + math.cos(math.pi * epoch / num_epochs)) / 2


def exponential(epoch: int, initial: float, decay: float) -> float:
    """Exponential decay, `initial * decay ** epoch` (ImageNet: 0.1 and 0.97).

    Raises:
        UserError: for rates that are no finite numbers of at least 0.
    """
    _check(initial=initial, decay=decay)
    return initial * decay**epoch


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"optimizer.schedule.{name}={value} must be a number of at least 0.")
