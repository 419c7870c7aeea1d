"""The command line: composes a config from conf/ and runs its task. README.md has the commands."""

import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dartsl.config import find_mistake
from dartsl.help import help_text

CONF = Path(__file__).parent.resolve() / "conf"
GROUPS = [path.name for path in CONF.iterdir() if path.is_dir()]
OmegaConf.register_new_resolver("help", lambda: help_text(CONF).replace("$", "$$"), replace=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the config's task; returns the value that a sweeper optimises."""
    from dartsl import tasks  # takes seconds, which help and misspelt commands do without

    try:
        return tasks.run(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            exit_if_mistake(error)
        raise  # of a sweep's jobs, the others go on


def exit_if_mistake(error: Exception) -> None:
    """End with one sentence where a person can mend what went wrong."""
    mistake = find_mistake(error, GROUPS)
    if mistake is not None:
        sys.exit(f"Error: {mistake}")


def cli() -> None:
    """`main`, ending with one sentence where a mistake shows before or after a task."""
    # Bare exceptions instead of Hydra's summary of them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except KeyboardInterrupt:  # before there is anything to save; later the run handles it
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        exit_if_mistake(error)
        raise


if __name__ == "__main__":
    cli()
