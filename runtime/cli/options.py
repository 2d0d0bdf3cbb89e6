"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ..backends.base import AUTO, BACKENDS, DEVICES, MOST_THREADS, PREPROCESS
from ..errors import InputError, suggestion
from ..files import require_file
from ..inputs import named_scans, one_scan
from ..manifest import PRECISIONS
from ..scan_files import ScanPath, require_scan
from ..volume import ReadOptions
from ..volume.folder import METADATA_COLUMNS, choose_tables

_F = TypeVar("_F", bound=Callable[..., Any])


class _ScanType(click.ParamType):
    """One scan, named by one word: a file, a folder, a zip, or a pattern of DICOM files."""

    name = "scan"

    def convert(self, value: str | ScanPath, param: click.Parameter | None, ctx: click.Context | None) -> ScanPath:
        """The scan, which is there; raises ``InputError`` as ``one_scan``."""
        found = one_scan([value])
        require_scan(found)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files and folders."""
        return [CompletionItem(incomplete, type="file")]


SCAN = _ScanType()
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
scans_argument = click.argument(
    "scans", metavar="SCAN...", nargs=-1, required=True, type=click.Path(),
    callback=lambda context, parameter, value: tuple(named_scans(value)))
json_option = click.option("--json", "as_json", is_flag=True, help="Print only JSON on standard output.")
preprocess_option = click.option("--preprocess", type=click.Choice(PREPROCESS), default=PREPROCESS[0],
                                 show_default=True,
                                 help="Where scans become inputs; gpu: with the back ends that run engines; auto: "
                                 "where fewer bytes go to the GPU.")
keep_going_option = click.option("--keep-going", is_flag=True,
                                 help="Go on after a scan that cannot be read; the exit code is 2 all the same.")


def scan_options(function: _F) -> _F:
    """What a user may know better than the file's header; arrives as keyword arguments of ``Model.preprocess``."""
    for option in reversed((
        click.option("--spacing", type=float, nargs=3, metavar="X Y Z",
                     help="Voxel spacing in mm along the stored axes, instead of the header's."),
        click.option("--slope", type=float, help="Rescale slope: HU = slope * value + intercept."),
        click.option("--intercept", type=float, help="Rescale intercept, in HU."),
        click.option("--orientation", metavar="NAME",
                     help="'as-stored' ignores the directions in the header."),
        click.option("--metadata", type=click.Path(path_type=Path), metavar="CSV",
                     help="Spacing, slope and intercept by file name, in CT-RATE's columns."),
        click.option("--series", metavar="UID", help="Of several DICOM series, the one to read."),
        click.option("--resample-irregular", is_flag=True, default=None,
                     help="Interpolate DICOM slices with gaps or a tilted gantry, instead of refusing them."),
    )):
        function = option(function)
    return function


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``scan_options`` that were given, once they are found to be usable, before any scan is read.

    Raises:
        InputError: impossible values, or no table of metadata.
    """
    given = {name: value for name, value in options.items() if value is not None}
    ReadOptions(**given)
    if (table := given.get("metadata")) is not None:
        choose_tables(table, (), METADATA_COLUMNS, "metadata")
    return given


def model_options(function: _F) -> _F:
    """How to run a bundle."""
    for option in reversed((
        click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True),
        click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; default: all usable cores."),
        click.option("--backend", type=click.Choice([*BACKENDS, AUTO]), default=BACKENDS[0], show_default=True,
                     help="Inference library; auto: the best that works here, said on standard error."),
        click.option("--precision", type=click.Choice(PRECISIONS), default=PRECISIONS[0], show_default=True,
                     help="Graphs to run; `dcformer calibrate` adds those other than fp32. bf16: openvino computes in "
                          "bfloat16 by itself."),
        click.option("--no-verify", is_flag=True, help="Do not compare the bundle's files with their sha256."),
    )):
        function = option(function)
    return function


def parse_names(option: str, text: str, known: Sequence[str], advice: str = "") -> list[str]:
    """Names separated by commas.

    Raises:
        InputError: one that is not known, or a name twice; ``advice`` ends the message.
    """
    names = [name.strip() for name in text.split(",")]
    for index, name in enumerate(names):
        if name not in known or name in names[:index]:
            near = "" if name in known or advice else suggestion(name, known)
            raise InputError(f"{option} {text!r}: expected some of {', '.join(known) or 'none'}, each once{near}"
                             f"{advice}")
    return names


def read_classes(path: Path | None) -> list[str] | None:
    """Class names from a text file, one per line; blank lines are skipped.

    Raises:
        InputError: no such file, not text, no name, or a name twice.
    """
    if path is None:
        return None
    require_file(path, "classes file")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; expected one class name per line") from error
    if not names:
        raise InputError(f"{path}: no class name in it; expected one per line")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: class {repeated[0]!r} stands there {names.count(repeated[0])} times")
    return names
