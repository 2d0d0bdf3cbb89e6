"""What commands print: tables on standard output, progress on standard error and only to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import one_line
from ..model import Model
from ..scan_files import ScanPath

#: Width of tables that go to a file or a pipe, where there is no terminal to ask.
_WIDTH_WITHOUT_TERMINAL = 120


def print_json(value: Any) -> None:
    """JSON, in ASCII, alone on standard output; NaN is an error rather than invalid JSON."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table; the first column is left-aligned, the others right-aligned."""
    click.echo(one_line(title))
    table = Table()
    for index, column in enumerate(columns):
        # Folded, not cut: a name that is cut cannot be copied.
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        # Text, not str: rich would take brackets in names of classes and files for its markup.
        table.add_row(*(Text(one_line(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL).print(table)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def announce(model: Model) -> None:
    """One line each on standard error: which back end was chosen, and weights that are known to be random."""
    if model.choice is not None:
        click.echo(f"backend: {one_line(model.choice)}", err=True)
    if not model.manifest.source.trained:
        click.echo("warning: this bundle was made from untrained weights: its scores mean nothing", err=True)


class Stages(Protocol):
    """Reports progress: ``stage`` names what begins, ``steps`` how far it is, ``advance`` counts one item done."""

    def stage(self, text: str) -> None:
        """Say what begins."""
        ...

    def steps(self, text: str, done: int, total: int) -> None:
        """Say how far the stage is, on a line of its own until the next stage begins."""
        ...

    def advance(self) -> None:
        """One item is done."""
        ...


class _TerminalStages:
    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._steps: TaskID | None = None

    def stage(self, text: str) -> None:
        if self._steps is not None:
            self._progress.remove_task(self._steps)
            self._steps = None
        self._progress.update(self._task, description=escape(text))

    def steps(self, text: str, done: int, total: int) -> None:
        if self._steps is None:
            self._steps = self._progress.add_task("")
        self._progress.update(self._steps, description=escape(text), completed=done, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)


class _SilentStages:
    def stage(self, text: str) -> None:
        """Nothing: no terminal is watching."""

    def steps(self, text: str, done: int, total: int) -> None:
        """Nothing: no terminal is watching."""

    def advance(self) -> None:
        """Nothing: no terminal is watching."""


class _IfCounted(ProgressColumn):
    """A column that stays empty for what nobody knows the end of."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        """The other column, or nothing."""
        return Text() if task.total is None else self._column.render(task)


@contextmanager
def progress(total: int | None = None) -> Iterator[Stages]:
    """A progress display on standard error; silent when that is no terminal."""
    if not sys.stderr.isatty():
        yield _SilentStages()
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), _IfCounted(BarColumn()),
               _IfCounted(MofNCompleteColumn()), TimeElapsedColumn()]
    # The stream as it is now: PyTorch's exporter is silenced by putting another in its place.
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as display:
        yield _TerminalStages(display, total)


def told(display: Stages) -> Callable[[ScanPath, str | None], None]:
    """What to call with each scan that is finished, and its error if it has one, which is printed at once."""

    def tell(path: ScanPath, error: str | None) -> None:
        display.stage(path.name)
        display.advance()
        if error is not None:
            click.echo(f"error: {one_line(error)}", err=True)

    return tell
