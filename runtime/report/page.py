"""From a template and what it shows to one file. Needs jinja2 and pillow (``pip install '.[report]'``)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError, one_line
from ..files import atomic_file

_TEMPLATES = Path(__file__).parent / "templates"
_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Section:
    """A table of a page: ``bars`` is the column whose numbers are also drawn, from 0; ``picture``: PNG."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    bars: int | None = None
    picture: bytes | None = None


def require_page_name(path: Path) -> None:
    """Raise InputError unless a browser would take the name for a page."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{path}: expected a name ending in .html")


def write_page(path: Path, template: str, **shown: Any) -> None:
    """Fill a template of this package and write it, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     finalize=_printable)
    page = environment.get_template(template).render(version=metadata.version("dcformer-deploy"), **shown)
    with atomic_file(path) as temporary:
        # Names of files need not be valid Unicode.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _printable(value: Any) -> Any:
    """Names may hold characters that steer a terminal or a browser: shown as what they are."""
    if isinstance(value, markupsafe.Markup) or not isinstance(value, str) or value.isprintable():
        return value
    return one_line(value)


def write_tables(path: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> None:
    """A page of tables. Raises like ``write_page``."""
    write_page(path, "tables.html", title=title, facts=facts, sections=[
        {"section": section, "lengths": _lengths(section), "picture": _embedded(section.picture)}
        for section in sections])


def picture(pixels: NDArray[np.uint8]) -> str:
    """A picture ``[rows, columns]`` grey or ``[rows, columns, 3]`` as the address of an ``<img>``."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return _embedded(file.getvalue()) or ""


def _embedded(png: bytes | None) -> str | None:
    return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _lengths(section: Section) -> list[float | None]:
    """Of bars, in percent of the longest; None where the cell is no number."""
    if section.bars is None:
        return [None] * len(section.rows)
    values = []
    for row in section.rows:
        try:
            values.append(max(0.0, float(row[section.bars].replace(",", ""))))
        except ValueError:
            values.append(None)
    longest = max((value for value in values if value), default=1.0)
    return [None if value is None else 100 * value / longest for value in values]
