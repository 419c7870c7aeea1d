"""The command line: composes a config from conf/ and runs its task. README.md has the commands."""

import os
import re
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from dartsl import tasks
from dartsl.errors import UserError, unknown

# Of Lightning 2.6 under torch 2.15 and later: nothing that a user can act on.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

GROUPS = [path.name for path in (Path(__file__).parent / "conf").iterdir() if path.is_dir()]


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the config's task; returns the value that a sweeper optimises."""
    try:
        return tasks.run(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            exit_if_mistake(error)
        raise  # of a sweep's jobs, the others go on


def exit_if_mistake(error: Exception) -> None:
    """End with one sentence where a person can mend what went wrong."""
    mistake = find_mistake(error)
    if mistake is not None:
        sys.exit(f"Error: {mistake}")


def find_mistake(error: BaseException | None) -> UserError | None:
    """The mistake behind an exception; Hydra and OmegaConf wrap those of what they build."""
    if error is None or isinstance(error, UserError):
        return error
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group, name, error.options)
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        node, _, key = str(error.full_key).rpartition(".")
        choices = {str(key) for key in error.parent_node or ()}
        return (
            unknown(f"key of {node}", key, choices)
            if node
            else unknown("key", key, choices.union(GROUPS))
        )
    if isinstance(error, OverrideParseException):
        return UserError(f"Cannot read {error.override!r}: {str(error).splitlines()[0]}.")
    cause = error.__cause__ or error.__context__
    if isinstance(error, ConfigCompositionException) and cause is None:
        key = re.match(r"Could not override '(\w+)'", str(error))
        return UserError(
            f"{key[1]!r} is no part of this experiment; what is, `--cfg job` shows."
            if key
            else " ".join(str(error).split())
        )
    return find_mistake(cause)


if __name__ == "__main__":
    # Bare exceptions instead of Hydra's summary of them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except Exception as error:
        exit_if_mistake(error)
        raise
