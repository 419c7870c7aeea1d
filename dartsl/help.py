"""What `python run.py --help` says of commands, groups and choices.

Nothing is typed here: a choice is a yaml file, and its line is the first comment on its top.
"""

from pathlib import Path

_LAUNCH = "python run.py"


def help_text(conf: Path) -> str:
    """The commands, then every group with its choices, one line each."""
    folders = sorted({path.parent for path in conf.glob("*/**/*.yaml")})
    groups = [_group(conf, folder) for folder in folders if folder.name != "experiment"]
    return "\n".join([_commands(conf / "experiment"), *groups])


def describe(path: Path) -> str:
    """The line of a choice; empty where its file has no comment on its top."""
    words = (line for line in _comments(path) if not line.startswith(("@package", _LAUNCH)))
    return next(words, "")


def launch(path: Path) -> str:
    """The command that an experiment's file has on its top; empty where there is none."""
    return next((line for line in _comments(path) if line.startswith(_LAUNCH)), "")


def _comments(path: Path) -> list[str]:
    """The comment on top of a file, without its signs."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return lines


def _commands(folder: Path) -> str:
    lines = ["Commands"]
    for path in sorted(folder.glob("*.yaml")):
        lines += [f"  {launch(path)}", f"      {describe(path)}"]
    return "\n".join(lines) + "\n"


def _group(conf: Path, folder: Path) -> str:
    paths = sorted(folder.glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    lines = [f"  {path.stem:<{width}}  {describe(path)}" for path in paths]
    return "\n".join([f"{folder.relative_to(conf).as_posix()}=...", *lines]) + "\n"
