"""Reports as a person uses them, in a headless Chromium."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dartsl.genotype import Genotype
from dartsl.report import write_report
from tests.report.test_report import HOSTILE
from tests.reports import write_search, write_training

playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is missing")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, or Playwright's own."""
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=installed)
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a report; at the end there was no error in the console, no dialog and no request."""
    complaints: list[str] = []
    contexts = []

    def open_report(folder: Path, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
        address = (folder / "report.html").as_uri()
        page.on("request", lambda r: r.url in (address, "data:,") or complaints.append(r.url))
        page.goto(address)
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A search of five epochs, and its history."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    lines = write_search(folder, epochs=5, config={"title": HOSTILE})
    write_report(folder)
    return folder, lines


def drawn(page: Any) -> set[str]:
    """The edges in the picture of the normal cell."""
    edges = page.locator("#cells .cell").first.locator("[data-edge]")
    return set(edges.evaluate_all("all => all.map(edge => edge.dataset.edge)"))


def expected(line: dict[str, Any]) -> set[str]:
    edges = Genotype.parse(line["genotype"]).normal
    return {f"{source}-{i // 2 + 2}-{name}" for i, (name, source) in enumerate(edges)}


def test_the_slider_moves_cells_and_heat_maps_by_keyboard(search: Any, open_page: Open) -> None:
    folder, lines = search
    page = open_page(folder)
    assert len({frozenset(expected(line)) for line in lines}) > 2  # or nothing would be seen
    slider = page.get_by_label("Epoch", exact=True)
    slider.focus()
    for key, epoch in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", 4)):
        slider.press(key)
        assert page.locator("output").inner_text() == f"Epoch {epoch + 1} of 5"
        assert drawn(page) == expected(lines[epoch])
        heat_map = page.locator("table.heat").first
        first_row = heat_map.locator("tbody tr").first.locator("td").all_inner_texts()
        assert first_row == [f"{value:.2f}" for value in lines[epoch]["strengths"]["normal"][0]]
        assert heat_map.locator("td.chosen").count() == 8
        # The charts' legends show the same epoch.
        accuracy = 100 * lines[epoch]["metrics"]["search/train_accuracy"]
        assert f"{accuracy:.2f} %" in page.locator(".legend").first.inner_text()


def test_nodes_have_the_numbers_of_the_genotype(search: Any, open_page: Open) -> None:
    texts = open_page(search[0]).locator("#cells .cell").first.locator("text:not(.name)")
    assert texts.all_text_contents() == ["0: ck−2", "1: ck−1", "2", "3", "4", "5", "ck"]


def test_playing_ends_at_the_last_epoch(search: Any, open_page: Open) -> None:
    page = open_page(search[0])
    page.get_by_role("button", name="Play").click()
    assert page.locator("output").inner_text() == "Epoch 1 of 5"
    page.get_by_text("Epoch 5 of 5").wait_for()
    page.get_by_role("button", name="Play").wait_for()


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_copy_buttons_copy(search: Any, open_page: Open, clipboard: bool) -> None:
    page = open_page(search[0], permissions=["clipboard-read", "clipboard-write"])
    if not clipboard:  # as in browsers that keep it from files
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    genotype = Genotype.load(search[0] / "genotype.yaml")
    for label, text in (
        ("Copy yaml", genotype.yaml()),
        ("Copy official notation", genotype.notation()),
    ):
        page.get_by_role("button", name=label).click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == text
        page.get_by_role("button", name=label).wait_for()


def test_texts_of_a_run_are_shown_as_they_are(search: Any, open_page: Open) -> None:
    page = open_page(search[0])
    page.get_by_text("Config", exact=True).click()
    assert "<img src=x onerror=alert(2)>&amp;" in page.locator("details pre").inner_text()
    assert page.locator("img").count() == 0


def test_light_and_dark(search: Any, open_page: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = open_page(search[0], color_scheme="light")
    dark = open_page(search[0], color_scheme="dark")
    backgrounds = light.evaluate(paper), dark.evaluate(paper)
    assert backgrounds[0] != backgrounds[1]
    light.get_by_role("button", name="light and dark").click()
    assert light.evaluate(paper) == backgrounds[1]


def test_a_phone_scrolls_wide_things_and_not_the_page(search: Any, open_page: Open) -> None:
    page = open_page(search[0], viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_sweeps_table_is_sorted_by_any_column(tmp_path: Path, open_page: Open) -> None:
    for name, accuracy in (("0", 0.97), ("1", None), ("2", 0.98), ("10", 0.96)):
        write_training(tmp_path / name, accuracy=accuracy)
    write_report(tmp_path)
    page = open_page(tmp_path)

    def runs() -> list[str]:
        return page.locator("tbody th").all_inner_texts()

    assert runs() == ["0", "1", "2", "10"]
    head = page.get_by_role("columnheader", name="test (%)")
    head.get_by_role("button").press("Enter")
    assert runs() == ["10", "0", "2", "1"]  # what is not known stands last
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert runs() == ["2", "0", "10", "1"]
    page.get_by_role("button", name="run", exact=True).click()
    assert runs() == ["0", "1", "2", "10"]
