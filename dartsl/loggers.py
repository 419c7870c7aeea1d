"""Loggers that Lightning's own do not cover."""

import os
from typing import Any

from pytorch_lightning.loggers import WandbLogger


def wandb_logger(**options: Any) -> WandbLogger:
    """A Weights & Biases logger that is offline where this machine has no key, and never asks.

    `WANDB_MODE` decides where it is set; `wandb sync` sends an offline run later.

    Args:
        **options: of Lightning's `WandbLogger`.
    """
    import wandb  # here, so that only those who log to it need it

    # Given as the run's own mode: Lightning's `offline` sets WANDB_MODE for the whole process, and
    # wandb has read that already.
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
        options.setdefault("mode", "offline")
    return WandbLogger(**options)
