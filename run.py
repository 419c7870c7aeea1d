"""The command line: composes a config from conf/ and runs its task. README.md has the commands."""

import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dartsl import tasks
from dartsl.errors import UserError

# Of Lightning 2.6 under torch 2.15 and later: nothing that a user can act on.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the config's task; returns the value that a sweeper optimises."""
    try:
        return tasks.run(cfg)
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise mistake from None  # fails this job; Hydra reports it
        sys.exit(f"Error: {mistake}")


def user_error(error: BaseException | None) -> UserError | None:
    """The mistake behind an exception; Hydra wraps those of the objects that it builds."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
