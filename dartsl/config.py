"""The composed config: checked, shown, composed again, and turned into commands to type.

A config is checked as far as it can be before anything is built: for values that are missing, and
for values that what they are given to does not take.

Nothing here imports torch or Lightning, which takes seconds, before a task needs them: help, what
`--cfg` shows, a shell's completion and misspelt commands do without.
"""

import errno
import inspect
import re
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast

import rich
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    OmegaConfBaseException,
)
from rich.syntax import Syntax
from rich.tree import Tree

from dartsl.errors import UserError, unknown


def count_classes(root: str) -> int:
    """See `dartsl.data.count_classes`."""
    from dartsl import data

    return data.count_classes(root)


def run_group() -> str:
    """What the runs of one sweep have in common: the experiment's name and the sweep's folder."""
    hydra = HydraConfig.get()
    experiment = str(hydra.runtime.choices["experiment"])
    sweep = hydra.mode == RunMode.MULTIRUN
    return f"{experiment}/{Path(hydra.sweep.dir).name}" if sweep else experiment


def run_tags() -> list[str]:
    """The names of the choices that make a run what it is."""
    choices = HydraConfig.get().runtime.choices
    groups = ("experiment", "data", "method", "genotype", "hardware")
    return [str(choices[group]) for group in groups if choices.get(group) is not None]


# So that an image folder's number of classes is never typed: conf/data/image_folder.yaml.
OmegaConf.register_new_resolver("count_classes", count_classes, replace=True)
# For conf/logger/wandb.yaml.
OmegaConf.register_new_resolver("run_group", run_group, replace=True)
OmegaConf.register_new_resolver("run_tags", run_tags, replace=True)

# ---- checks --------------------------------------------------------------------------------------


def check_missing(cfg: DictConfig) -> None:
    """Raise a UserError for the values that the command has to give and did not."""
    # Unlike OmegaConf.missing_keys this resolves nothing: what depends on such a value fails.
    leaves = _leaves(OmegaConf.to_container(cfg, resolve=False))
    missing = [key for key, value in leaves.items() if value == "???"]
    if missing:
        raise UserError(f"The command lacks {' '.join(f'{key}=...' for key in missing)}")


# What the tasks themselves take.
_TASK_TYPES = {
    "task": str, "seed": int, "threads": int | None, "ckpt_path": str | None, "output_dir": str,
    "print_config": bool, "test": bool, "next_experiment": str | None, "run_dir": str,
    "random_cells": int, "genotypes": str | list | None, "title": str | None,
    "experiments": tuple[str, str],
}  # fmt: skip


def check_types(cfg: DictConfig) -> None:
    """Raise a UserError for a value of another name or type than what it is given to takes."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    _check_types("", plain, _TASK_TYPES)
    _check_types("hardware.", plain.get("hardware") or {}, {"cuda_graphs": bool})
    _check_built(plain)
    _check_trainer(plain.get("trainer") or {})
    for path, node in _targets(plain):
        target = _find_target(path, node["_target_"])
        _check_names(path, node, parameter_names(target))
        _check_types(path, node, parameter_types(target))


def _check_built(plain: dict[str, Any]) -> None:
    """Raise a UserError for a part of which nothing can be built."""
    built = {name: plain[name] for name in _BUILT if name in plain}
    for group in _BUILT_EACH:
        built |= {f"{group}.{name}": node for name, node in (plain.get(group) or {}).items()}
    for name, node in built.items():
        if not (isinstance(node, dict) and "_target_" in node):
            raise UserError(
                f"{name} lacks a _target_, the name of the class that it describes: leave {name} "
                f"as it was, or give {name}._target_=CLASS."
            )


# Parts of the config from which something is built, and groups of such parts.
_BUILT = ("supernet", "network", "module", "data", "trainer")
_BUILT_EACH = ("callbacks", "logger")


def _check_trainer(trainer: dict[str, Any]) -> None:
    """Raise a UserError for what Lightning takes and then fails with."""
    for key in ("check_val_every_n_epoch", "val_check_interval"):
        if trainer.get(key) == 0:
            raise UserError(
                f"trainer.{key}=0 must be above 0; trainer.limit_val_batches=0 validates nothing."
            )
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str) and strategy != "auto":
        raise UserError(
            f"trainer.strategy={strategy} does not average what a search and a training average: "
            "leave it out, or choose hardware=multi_gpu, ddp_cpu or multi_node."
        )


def _find_target(path: str, name: Any) -> Any:
    """What a `_target_` names; what fails within the module that it names is no misspelling."""
    target = None
    try:
        target = get_object(name) if isinstance(name, str) else None
    except (ImportError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError):
            misspelt = f"{name}.".startswith(f"{cause.name}.")
        else:
            misspelt = cause is None or isinstance(cause, AttributeError)
        if not misspelt:
            raise
    if not callable(target):
        raise UserError(
            f"{path}_target_={name} names no class and no function: give its whole name, as "
            "dartsl.networks.Supernet is one."
        )
    return target


def _check_names(path: str, node: dict[str, Any], names: set[str] | None) -> None:
    for name in node:
        if names is not None and name not in names and not re.fullmatch("_[a-z]+_", name):
            raise unknown(f"key of {path.rstrip('.')}", name, names)


def _check_types(path: str, node: dict[str, Any], hints: dict[str, Any]) -> None:
    for name, hint in hints.items():
        if name in node and not admits(hint, node[name]):
            raise UserError(f"{path}{name}={node[name]} must be {describe(hint)}.")


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes with a `_target_`, each with the prefix of its keys."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}{key}.")


def parameter_names(target: Any) -> set[str] | None:
    """The names of a function's or a constructor's parameters; None where it takes any.

    What a constructor takes as ** is taken to be for the base class, where both are of one package.
    """
    takers = [target]
    if inspect.isclass(target):
        torch = sys.modules.get("torch")
        if torch is not None and target.__init__ is torch.nn.Module.__init__:
            return set()  # it has **kwargs, and refuses them
        package = target.__module__.partition(".")[0]
        bases = [base for base in target.__mro__[1:] if "__init__" in vars(base)]
        takers += [base for base in bases if base.__module__.partition(".")[0] == package]
    names: set[str] = set()
    for taker in takers:
        try:
            parameters = inspect.signature(taker).parameters
        except ValueError:  # of a type written in C
            return None
        names |= {name for name, each in parameters.items() if each.kind not in _STARRED}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            return names
    return None


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameter_types(target: Any) -> dict[str, Any]:
    """The annotations of a function's or a constructor's parameters, those behind ** included."""
    if not inspect.isclass(target):
        return _function_types(target)
    hints: dict[str, Any] = {}
    for base in reversed(target.__mro__):
        if "__init__" in vars(base):
            hints |= _function_types(vars(base)["__init__"])
    return hints


def _function_types(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.items()
    optional = {name for name, parameter in parameters if parameter.default is None}
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return {name: hint | None if name in optional else hint for name, hint in hints.items()}


def admits(hint: Any, value: Any) -> bool:
    """Whether a parameter with this annotation takes the value of a config."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # whatever that is
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(admits(part, value) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is Any or origin is object or not inspect.isclass(origin):
        return True
    if getattr(origin, "_is_protocol", False):
        return False  # no plain value fulfils one
    if isinstance(value, list):
        return (origin is tuple or issubclass(list, origin)) and _admits_each(hint, value)
    if isinstance(value, dict):
        return issubclass(dict, origin)
    if value is None or isinstance(value, bool):
        return origin is type(value)
    if origin in _ALSO_TAKE:
        return isinstance(value, _ALSO_TAKE[origin])
    return origin in (int, str) and isinstance(value, origin)  # nothing else is a plain value


def _admits_each(hint: Any, values: list[Any]) -> bool:
    """Whether a list's, or a tuple's, elements may be these."""
    parts = typing.get_args(hint)
    if len(parts) == 1 or parts[1:] == (...,):
        return all(admits(parts[0], value) for value in values)
    return not parts or (len(parts) == len(values) and all(map(admits, parts, values)))


_ALSO_TAKE: dict[Any, Any] = {float: int | float, Path: str}
_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    list: "a list", tuple: "a list", Sequence: "a list",
}  # fmt: skip


def describe(hint: Any) -> str:
    """What a parameter with this annotation takes of what a config can hold, in words."""
    parts = list(dict.fromkeys(_plain_choices(hint))) or ["something else"]
    return parts[0] if len(parts) == 1 else f"one of {', '.join(parts)}"


def _plain_choices(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for part in arguments:
            if part is type(None) or (inspect.isclass(part) and part not in _WORDS):
                continue  # no value that a config can hold
            yield from _plain_choices(part)
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin is tuple and arguments and ... not in arguments:
        yield f"a list of {len(arguments)}, each {describe(arguments[0])}"
    elif _WORDS.get(origin) == "a list" and arguments:
        yield f"a list, each {describe(arguments[0])}"
    else:
        yield _WORDS.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def find_validation_fault(cfg: DictConfig) -> str | None:
    """Why nothing may be selected by a run's validation accuracy, in words; None where it may.

    With data.train_fraction=1 the validation set is the test set, as in the official code.
    """
    if cfg.task not in ("search", "train", "select"):
        return f"task={cfg.task} finds no validation accuracy to select by."
    fraction, batches = cfg.data.train_fraction, cfg.trainer.limit_val_batches
    if not (isinstance(fraction, float) and 0 < fraction < 1):
        return (
            f"data.train_fraction={fraction} leaves no training images to select by; choose a "
            "number between 0 and 1, e.g. 0.5."
        )
    if batches is not None and batches <= 0:
        return f"trainer.limit_val_batches={batches} leaves no images to select by; null takes all."
    return None


# Launchers and sweepers that come with an extra of this package -> the extra.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


# Errors of disks, rights and names: no bug of ours, and nothing that a traceback would explain.
OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def find_mistake(error: BaseException | None, groups: Collection[str]) -> UserError | None:
    """The mistake behind an exception; Hydra and OmegaConf wrap those of what they build.

    Args:
        error: what was raised.
        groups: of the config; a misspelt one looks like a misspelt key.
    """
    if error is None or isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and (
        error.errno in OF_THE_MACHINE or _raised_in(error) == "hydra.core.utils"  # run's folder
    ):
        name = "" if error.filename is None else f" {str(error.filename)!r}"
        return UserError(f"Cannot use the file or folder{name}: {error.strerror}.")
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return UserError(
            "BatchNorm has nothing to normalise in a batch of one image whose maps are one pixel: "
            "set data.batch_size to at least 2 or, of a training, network.auxiliary=false."
        )
    if isinstance(error, InstantiationException) and _is_refused(error.__cause__):
        reason, _, key = str(error).rpartition("full_key: ")
        reason = " ".join(str(error.__cause__ or reason).split())
        return UserError(
            f"{key} cannot be built: {reason.rstrip('.')}. `--cfg job` shows what it is given."
        )
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for a mistake
        return UserError(" ".join(str(error).split()))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in EXTRAS:
        return UserError(
            f"{error.missing_cfg_file} is an extra that is not installed: "
            f"pip install -e '.[{EXTRAS[error.missing_cfg_file]}]'"
        )
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group, name, error.options)
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        node, _, key = str(error.full_key).rpartition(".")
        choices = {str(key) for key in error.parent_node or ()}
        if node:
            return unknown(f"key of {node}", key, choices)
        return _no_part(key) if key in groups else unknown("key", key, choices.union(groups))
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if not equals:
            return UserError(
                f"Cannot read {error.override!r}: every word of a command is KEY=VALUE, such as "
                "experiment=search_digits; `--help` shows what there is."
            )
        return UserError(
            f"Cannot read {error.override!r}: {str(error).splitlines()[0]}. A text with signs like "
            f'these is quoted, for Hydra and for the shell: "{key}={quote(value)}"'
        )
    if (
        isinstance(error, TypeError) and _raised_in(error) == "hydra._internal.defaults_list"
    ) or str(error).startswith("Config group override"):  # of Hydra, a plain ValueError
        return UserError(
            "A group takes a name, or a list of names, and nothing else: data=digits. Of loggers "
            "there may be none: logger=[]."
        )
    cause = error.__cause__ or error.__context__
    refused = re.match(r"Could not override '(\w+)'", str(error))
    if isinstance(error, ConfigCompositionException) and cause is None and refused:
        return _no_part(refused[1])
    if isinstance(error, ConfigCompositionException) and isinstance(cause, GrammarParseError):
        return UserError(f"{error}: {' '.join(str(cause).split())}.")
    mistake = find_mistake(cause, groups)
    if mistake is None and isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        return UserError(" ".join(str(error).split()))
    return mistake


def _is_refused(cause: BaseException | None) -> bool:
    """Whether Hydra refuses to call a target, or the call itself does not fit it.

    What fails within the target is no mistake in a config; those of our data pass arguments on.
    """
    return cause is None or (
        isinstance(cause, TypeError)
        and re.search(r"\(\) (missing \d+ required|got an unexpected) ", str(cause)) is not None
        and str(_raised_in(cause)).startswith(("hydra.", "dartsl.data."))
    )


def _no_part(name: str) -> UserError:
    return UserError(f"{name!r} is no part of this experiment; what is, `--cfg job` shows.")


def _raised_in(error: BaseException) -> str | None:
    """The name of the module whose code raised an exception, or asked pathlib for it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__") for frame in frames]
    return next((name for name in reversed(names) if name != "pathlib"), None)


# What may differ between a run and the one that goes on with it: nothing of it moves a number.
FREE_KEYS = (
    "resume", "print_config", "output_dir", "next_experiment", "threads", "callbacks", "logger",
    "hardware", "run_dir", "random_cells", "only",
    "data.num_workers", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.strategy", "trainer.log_every_n_steps", "trainer.profiler", "trainer.default_root_dir",
    "trainer.enable_model_summary", "trainer.num_sanity_val_steps",
)  # fmt: skip


def differing_keys(before: DictConfig, now: DictConfig) -> list[str]:
    """The keys by which two configs give other numbers."""
    first, second = (_leaves(OmegaConf.to_container(cfg, resolve=True)) for cfg in (before, now))
    free = [*FREE_KEYS]
    if now.task != "evaluate":
        free.append("ckpt_path")  # where the run before went on from
    if any(first.get(key) != second.get(key) for key in ("trainer.devices", "trainer.num_nodes")):
        free.append("data.batch_size")  # of one process; the sum is checked with the data's state
    return [
        key
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
        and not any(key == part or key.startswith(f"{part}.") for part in free)
    ]


def _leaves(node: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """All values of nested mappings by their dotted keys."""
    if not isinstance(node, dict):
        return {".".join(path): node}
    return {key: leaf for k, v in node.items() for key, leaf in _leaves(v, (*path, str(k))).items()}


# ---- show and compose ----------------------------------------------------------------------------


def print_tree(cfg: DictConfig) -> None:
    """Show a config as a tree."""
    tree = Tree("config")
    for name, node in cfg.items():
        if OmegaConf.is_config(node):
            text = OmegaConf.to_yaml(node).rstrip()
            tree.add(str(name)).add(Syntax(text, "yaml", background_color="default"))
        else:
            tree.add(f"{name!s}: {node}")
    rich.print(tree)


def resolved(cfg: DictConfig) -> DictConfig:
    """A copy without interpolations."""
    return cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))


def build(node: DictConfig) -> Any:
    """What a config node describes, as a partial that takes the rest; holds plain containers."""
    return instantiate(node, _partial_=True, _convert_="all")


def compose_experiment(name: str, *overrides: str) -> DictConfig:
    """The config of an experiment under the overrides of this run, and then these.

    Raises:
        UserError: where the experiment does not take one of them.
    """
    try:
        given = [f"experiment={name}", "print_config=false", *given_overrides()]
        return compose("config", [*given, *overrides])
    except MissingConfigException:  # it names the choices
        raise
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"experiment={name} does not take what was given: {reason}") from error


# ---- commands ------------------------------------------------------------------------------------


def given_overrides() -> list[str]:
    """The overrides of the command line but the names of experiments."""
    given = HydraConfig.get().overrides.task
    names = ("experiment=", "experiments=")
    return [override for override in given if not override.startswith(names)]


def kept_overrides(given: Iterable[str] | None = None) -> list[str]:
    """Those of the overrides that the next command needs too: the same data, hardware and logger.

    Args:
        given: of a run; default: those of this one.
    """
    overrides = given_overrides() if given is None else given
    return [override for override in overrides if _KEPT.match(override.lstrip("+"))]


# All of the data but what a search and a training have each for itself.
_KEPT = re.compile(
    r"(data|hardware|logger|threads)=|hardware\.|logger\.\w+\.(project|entity|mode)="
    r"|data\.(?!(batch_size|train_fraction|max_images|task|seed|cutout_length)=)"
    r"|trainer\.(accelerator|devices|num_nodes|strategy|precision|sync_batchnorm)="
)


def command(*overrides: str) -> str:
    """A command to type here; names the interpreter where it is one of this folder."""
    interpreter = relative(sys.executable)
    python = "python" if Path(interpreter).is_absolute() else interpreter
    started = relative(sys.argv[0])  # of a launcher's process something else
    script = started if Path(started).name == "run.py" else "run.py"
    return shlex.join([python, script, *overrides])


def quote(path: str | Path) -> str:
    """A path as a value of Hydra's override grammar, where `=`, `,` and spaces have a meaning."""
    text = str(path)
    plain = all(char.isalnum() or char in "/-_.+" for char in text)
    return text if plain else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def relative(path: str | Path) -> str:
    """A path as seen from the present folder, where it lies within it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
