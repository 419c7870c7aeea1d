"""Files that are whole or not there: a run may be killed, and a disk full, at any moment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dartsl.errors import UserError

# What a run leaves in its folder, beside genotype.GENOTYPE_FILE and what its callbacks write.
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.yaml"
RESULT_FILE = "result.yaml"
REPORT_FILE = "report.html"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; what stands there afterwards takes the place of `path`, at once.

    Until then `path` is what it was, and so it stays where writing fails. Folders are made. Several
    processes may write it, such as the jobs of a sweep; the last one's stays.

    Args:
        path: of the file.

    Raises:
        UserError: where it cannot be written: a full disk, a folder that is read-only or gone.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            flush(part)  # or a power cut could leave the new name with none of the content
            part.replace(path)
            flush(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. "
            "What stood there before is untouched. Make room, or choose another folder by "
            "hydra.run.dir=FOLDER."
        ) from error


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
