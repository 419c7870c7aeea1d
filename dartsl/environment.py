"""What a run ran on: versions, hardware, and the commit of the code."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dartsl", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


def environment() -> dict[str, Any]:
    """Of this process, as plain data; what cannot be found out is left out."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "commit": commit(Path(__file__)),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus),
        "cuda": torch.version.cuda if gpus else None,
    }
    return {name: value for name, value in found.items() if value}


def commit(file: Path) -> str | None:
    """The commit that a file is checked out at, if it is; says where the checkout has changes."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)  # not a package inside another
        head = _git(file.parent, "rev-parse", "HEAD")
        changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head} with changes" if changes else head


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    return subprocess.run(command, cwd=folder, **options).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
