"""The report as one HTML page that needs nothing outside itself: no network, no other file.

What a model or a test is named is not ours: the template escapes every text, and no text reaches a script. The page's scripts
are the same in every report, and its content security policy names them by their digests, so that no other one runs.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_batchinv.report import json
from pytest_batchinv.report.record import Record

if TYPE_CHECKING:
    from pytest_batchinv.report.results import Results
    from pytest_batchinv.report.saved import Saved

NEEDS = ("jinja2", "matplotlib")
_HERE = Path(__file__).parent


def missing() -> str:
    """What a page needs and is not installed, as the end of a sentence; empty where all is there."""
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    are = "is" if len(absent) == 1 else "are"
    return f"needs {' and '.join(absent)}, which {are} not installed: pip install 'pytest-batchinv[report]'."


def write(results: Results, path: Path) -> str:
    """Writes the page whole or not at all. Returns a line that says so. Raises OSError."""
    write_saved(json.contents(results), path)
    scripts = json.write_scripts(results.records, path)
    return f"page of this run: {path}" + f", and {scripts}" * bool(scripts)


def write_saved(saved: Saved, path: Path) -> None:
    page = render(saved.records, saved.machine, saved.settings, saved.outcome)
    json.replace(path, page.encode("utf-8", "backslashreplace"))


def render(
    records: Sequence[Record], machine: Mapping[str, str], settings: Mapping[str, Any], outcome: Mapping[str, int | None]
) -> str:
    """The page as text. machine: of a run without records; each record has its own."""
    import jinja2
    from markupsafe import Markup

    from pytest_batchinv.report.html import charts, view

    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        page=view.page(records, machine, settings, outcome),
        style=Markup(style),
        script=Markup(script),
        script_digest=_digest(script),
        growth=lambda trace, name: Markup(charts.growth(trace, name)),
        histogram=lambda trace, name: Markup(charts.histogram(trace, name)),
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
