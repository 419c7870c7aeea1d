"""What reports say, that nothing of a run becomes markup, and that they spoil no run."""

import itertools
import logging
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.report import leave_report, write, write_report
from dartsl.report.runs import runs_below
from dartsl.search_space import SearchSpace
from tests.reports import report_content, write_overrides, write_search, write_training


def test_a_searchs_report_says_what_its_history_says(tmp_path: Path) -> None:
    lines = write_search(tmp_path, epochs=4)
    assert write_report(tmp_path) == [tmp_path / "report.html", tmp_path / "search.gif"]
    content = report_content(tmp_path)

    facts = dict(content["facts"])
    assert facts["Accuracy, alpha half, last epoch"] == "30.00 %"
    assert facts["Accuracy, alpha half, best epoch"] == "30.00 % (epoch 4)"
    assert facts["Epochs"] == "4 of 4"
    assert facts["Time"] == "4 min 06 s"
    charts = {chart["title"]: chart["series"] for chart in content["charts"]}
    # No value of it is known.
    assert [series["name"] for series in charts["Loss"]] == ["weight half"]
    assert charts["Accuracy"][1]["values"] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert "Drop path" not in charts
    assert content["numbers"]["rows"][3][0] == 4

    search, cells = content["search"], content["pictures"]["cells"]
    for line, index in zip(lines, search["genotypes"], strict=True):
        assert cells[index]["notation"] == line["genotype"]
        layout = cells[index]["layout"]["normal"]
        genotype = Genotype.parse(line["genotype"])
        assert [(e["primitive"], e["source"]) for e in layout["edges"]] == list(genotype.normal)
        assert layout["nodes"] == cells[0]["layout"]["normal"]["nodes"]
        assert layout["names"] == ["0: c_{k-2}", "1: c_{k-1}", "2", "3", "4", "5", "c_{k}"]
    final = cells[content["genotype"]]
    assert Genotype.parse(final["yaml"]) == Genotype.parse(final["notation"])
    assert Genotype.parse(final["yaml"]) == Genotype.load(tmp_path / "genotype.yaml")
    assert search["strengths"][2]["reduce"][13] == pytest.approx(
        lines[2]["strengths"]["reduce"][13], rel=1e-4
    )
    assert search["edges"][5] == [4, 0]
    assert ["cpu", "A"] in content["environment"]
    with Image.open(tmp_path / "search.gif") as animation:
        assert animation.n_frames == 4


def test_a_report_made_again_is_the_same(tmp_path: Path) -> None:
    write_search(tmp_path, epochs=2, space=SearchSpace(num_intermediate_nodes=2))
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_a_trainings_report_names_no_best_epoch(tmp_path: Path) -> None:
    write_training(tmp_path, accuracy=0.9725)
    write_report(tmp_path)
    facts = dict(report_content(tmp_path)["facts"])
    assert facts["Test accuracy"] == "97.25 %"
    assert not any("best" in name for name in facts)


def test_a_search_that_was_killed_has_a_report(tmp_path: Path) -> None:
    write_search(tmp_path, epochs=2)
    for name in ("genotype.yaml", "environment.yaml", "config.yaml", "result.yaml"):
        (tmp_path / name).unlink()
    write_report(tmp_path)
    content = report_content(tmp_path)
    assert content["genotype"] is None
    assert len(content["search"]["strengths"]) == 2


def test_a_sweeps_report_has_means_of_the_finished_runs(tmp_path: Path) -> None:
    accuracies = {"0": 0.97, "2": 0.975, "10": 0.98}
    for name, accuracy in accuracies.items():
        write_training(tmp_path / name, accuracy=accuracy)
    write_training(tmp_path / "3", accuracy=None, ended=False)  # was killed
    write_overrides(tmp_path / "4", "seed=<b>4</b>")  # failed before it began
    write_search(tmp_path / "5" / "search")
    write_report(tmp_path / "0")
    assert write_report(tmp_path) == [tmp_path / "report.html"]

    content = report_content(tmp_path)
    tables = {table["title"]: table for table in content["tables"]}
    trainings = tables["Trainings"]
    assert [row[0] for row in trainings["rows"]] == ["0", "2", "3", "10"]
    values = [100 * accuracy for accuracy in accuracies.values()]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert dict(trainings["means"])["test"] == f"{mean:.2f} ± {deviation:.2f} % (n = 3)"
    assert trainings["complete"] == "3 of 4"
    assert trainings["reports"] == ["0/report.html", None, None, None]
    assert tables["Without a result"]["rows"] == [["4", "seed=<b>4</b>"]]
    assert tables["Searches"]["rows"][0][0] == "5/search"
    assert [cell["run"] for cell in content["cells"]] == ["5/search"]


def test_a_run_is_finished_when_it_says_so(tmp_path: Path) -> None:
    write_training(tmp_path / "untested", accuracy=None)
    write_training(tmp_path / "of_many_steps", accuracy=0.5, max_epochs=1000)
    write_training(tmp_path / "killed", accuracy=0.5, max_epochs=None, ended=False)
    finished = {run.folder.name for run in runs_below(tmp_path) if run.is_complete}
    assert finished == {"untested", "of_many_steps"}


def test_runs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("²", "10", "9"):  # the first is a digit, but no number
        write_training(tmp_path / name, accuracy=None)
    assert [run.folder.name for run in runs_below(tmp_path)] == ["9", "10", "²"]


def means_of_trainings(folder: Path) -> list[list[str]]:
    """What the report of a folder's runs says of their test accuracy."""
    write_report(folder)
    tables = {table["title"]: table for table in report_content(folder)["tables"]}
    return [pair for pair in tables["Trainings"]["means"] if pair[0].endswith("test")]


def test_a_sweeps_report_has_a_mean_for_each_setting(tmp_path: Path) -> None:
    settings = itertools.product(("0.01", "0.1"), (0, 1))
    for number, (rate, seed) in enumerate(settings):
        write_training(tmp_path / f"{number}", accuracy=0.1 * number)
        write_overrides(tmp_path / f"{number}", "data=digits", f"lr={rate}", f"seed={seed}")
    write_training(tmp_path / "4", accuracy=0.9)  # a single run has no spread to tell of
    write_overrides(tmp_path / "4", "data=digits", "lr=1", "seed=0")
    assert means_of_trainings(tmp_path) == [
        ["lr=0.01 · test", "5.00 ± 7.07 % (n = 2)"],
        ["lr=0.1 · test", "25.00 ± 7.07 % (n = 2)"],
    ]


def test_cells_are_averaged_over_only_where_the_seed_found_them(tmp_path: Path) -> None:
    quick_starts, selection = tmp_path / "quick_starts", tmp_path / "selection"
    for number, name in enumerate(("darts_v1", "darts_v2")):
        quick_start = quick_starts / f"{number}"
        write_overrides(quick_start, f"seed={number}")
        for folder in (quick_start / "train", selection / f"{number}"):
            write_training(folder, accuracy=0.1 * number)
            published(name).save(folder / "genotype.yaml")
    assert means_of_trainings(quick_starts) == [["test", "5.00 ± 7.07 % (n = 2)"]]
    assert means_of_trainings(selection) == []


class Tags(HTMLParser):
    """The tags of a page, and where its scripts end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028\u2029<!--"


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    plain, hostile = tmp_path / "a" / "b", tmp_path / "a" / "<b onclick=alert(1)>"
    write_search(plain, epochs=1)
    write_search(hostile, epochs=1, config={"title": HOSTILE})
    for folder in (plain, hostile):
        write_report(folder)
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (plain, hostile)]
    assert Tags(pages[0]).tags == Tags(pages[1]).tags
    assert "\u2028" not in pages[1]
    content = report_content(hostile)
    assert HOSTILE.split("\u2028")[0] in content["config"]
    assert content["title"] == "Search · a/<b onclick=alert(1)>"


def test_a_report_that_fails_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        leave_report(tmp_path)
    assert "could not be written" in caplog.text
    assert "disk full" in caplog.text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No run in .*give run_dir=FOLDER"):
        write_report(tmp_path)
