"""From a run's folder to `report.html`.

The page is put together from three files: `page.html` with the places, `page.css`, and `page.js`,
which draws the content. Nothing that a run says becomes part of the markup: the content is JSON
that holds no character with a meaning in HTML, the script makes text nodes of it, and the page's
policy allows this script and style alone, and no request at all.
"""

import base64
import hashlib
import json
import logging
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from dartsl.distributed import is_first_process
from dartsl.errors import UserError
from dartsl.files import REPORT_FILE, whole_file
from dartsl.history import HISTORY_FILE
from dartsl.report.content import run_content, sweep_content
from dartsl.report.runs import Run, runs_below
from dartsl.visualize import draw_epochs, save_animation

log = logging.getLogger(__name__)

ANIMATION_FILE = "search.gif"


def leave_report(folder: str | Path) -> None:
    """Write the report of a run that has ended; the run's result counts, whatever fails here."""
    if not is_first_process():
        return
    try:
        write_report(folder)
    except UserError as error:
        log.warning("No report (a run that ends within its first epoch has none): %s", error)
    except Exception:
        log.warning("The report of %s could not be written.", folder, exc_info=True)


def write_report(folder: str | Path) -> list[Path]:
    """Write the report of a run, or of the runs below a folder, into it; and a search's animation.

    Args:
        folder: of a search, of a training, of a sweep of them, or of anything that holds several.

    Returns:
        The paths written.

    Raises:
        UserError: where there is no run.
    """
    folder = Path(folder)
    run = Run(folder)
    if run.history:
        content = run_content(run)
    else:
        runs = runs_below(folder)
        if not any(below.history for below in runs):
            raise UserError(
                f"No run in {str(folder)!r}: give run_dir=FOLDER, a folder that holds a "
                f"{HISTORY_FILE} or, as a sweep's does, folders that do."
            )
        content = sweep_content(folder, runs)
    path = folder / REPORT_FILE
    with whole_file(path) as part:
        part.write_text(render(content), encoding="utf-8")
    animation = animate(run)
    return [path] if animation is None else [path, animation]


def animate(run: Run) -> Path | None:
    """A search's animation, which needs the genotypes of its epochs."""
    if not run.genotypes:
        return None
    strengths = [
        {kind: torch.tensor(weights) for kind, weights in line["strengths"].items()}
        for line in run.history
    ]
    pictures = draw_epochs(run.genotypes, strengths, run.space)
    return save_animation(pictures, run.folder / ANIMATION_FILE)


def render(content: dict[str, Any]) -> str:
    """The page with this content in it."""
    folder = Path(__file__).parent
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    return Template(page).substitute(
        title=escape(content["title"]),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        content=_inert(json.dumps(content, allow_nan=False)),
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inert(text: str) -> str:
    """JSON without a character that could end the element that it stands in."""
    # json.dumps has escaped all but ASCII, so U+2028 too.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
