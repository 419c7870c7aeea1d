"""Files are whole or not there, whoever else writes them."""

import multiprocessing
from pathlib import Path

from dartsl.files import whole_file


def write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text)


def test_processes_write_a_file_beside_each_other(tmp_path: Path) -> None:
    """As the jobs of a sweep do the sweep's report."""
    path = tmp_path / "report.html"
    with whole_file(path) as part:
        part.write_text("this")
        other = multiprocessing.get_context("spawn").Process(target=write, args=(path, "other"))
        other.start()
        other.join()
        assert path.read_text() == "other"
    assert path.read_text() == "this"
    assert list(tmp_path.iterdir()) == [path]
