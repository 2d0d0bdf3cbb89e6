"""``dcformer doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from ..backends import Options
from ..backends.base import AUTO
from ..backends.choose import choose_backend
from ..backends.openvino import import_openvino, shared_core
from ..bundle import open_bundle
from ..errors import DcformerError, install, one_line
from ..gpu import current_gpu
from ..machine import processor
from ..manifest import PRECISIONS
from .options import json_option
from .output import print_json, print_table

_DISTRIBUTION = "dcformer-deploy"
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
#: Not for users.
_HIDDEN = ("dev",)


@dataclass(frozen=True)
class Extra:
    """``installed``: version by package; ``missing``: packages; ``command``: what installs them, None if none is."""

    name: str
    installed: dict[str, str]
    missing: tuple[str, ...]
    command: str | None


@click.command("doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
def command(bundle: Path | None, as_json: bool) -> int:
    """Show what is installed here, which devices there are, and what would run BUNDLE, and why.

    Exit code 3 if no back end is installed.
    """
    facts, extras = _facts(), _extras()
    backends = _backends()
    choices = _choices(bundle) if bundle is not None else {}
    if as_json:
        print_json({"facts": facts, "backends": backends, "extras": [asdict(extra) for extra in extras],
                    "choices": choices})
    else:
        print_table("this machine", ("", "found"), facts.items())
        print_table("back ends", ("", "found"), backends.items())
        print_table("extras", ("", "installed", "missing", "to install"), (
            (extra.name, ", ".join(f"{name} {version}" for name, version in extra.installed.items()) or "-",
             ", ".join(extra.missing) or "-", extra.command or "-") for extra in extras))
        if choices:
            print_table(f"--backend auto would run {bundle}", ("precision", "with"), choices.items())
    if not any(_found(module) for module in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")):
        click.echo(f"error: no back end is installed; {install('cpu')}", err=True)
        return 3
    return 0


def _facts() -> dict[str, str]:
    try:
        gpu = current_gpu()
        found = f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB"
    except DcformerError as error:
        found = f"none ({one_line(str(error))})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {_DISTRIBUTION: metadata.version(_DISTRIBUTION), "Python": platform.python_version(),
            "system": platform.platform(), "processor": processor(),
            "cores this process may use": str(Options().thread_count), "memory": f"{memory:.0f} GiB", "GPU": found}


def _backends() -> dict[str, str]:
    """What each inference library says of itself."""
    return {"onnxruntime": _onnxruntime(), "openvino": _openvino(), "tensorrt": _version("tensorrt"),
            "tensorrt_rtx": _version("tensorrt_rtx")}


def _onnxruntime() -> str:
    if not _found("onnxruntime"):
        return "not installed"
    import onnxruntime

    both = all(_installed(name) is not None for name in ("onnxruntime", "onnxruntime-gpu"))
    warning = "; onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one" if both else ""
    return f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}{warning}"


def _openvino() -> str:
    if not _found("openvino"):
        return "not installed"
    return f"{import_openvino().__version__}: {', '.join(shared_core().available_devices)}"


def _version(module: str) -> str:
    if not _found(module):
        return "not installed"
    try:
        return str(importlib.import_module(module).__version__)
    except (ImportError, OSError, AttributeError) as error:
        return f"installed, but does not load: {one_line(str(error))}"


def _extras() -> list[Extra]:
    """As the installed package names them."""
    packages: dict[str, list[str]] = {name: [] for name in metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or
                                      () if name not in _HIDDEN}
    for requirement in metadata.requires(_DISTRIBUTION) or ():
        extra, name = _EXTRA.search(requirement), _NAME.match(requirement)
        if extra and name and extra[1] in packages and name[0] != _DISTRIBUTION:
            packages[extra[1]].append(name[0])
    return [_extra(name, required) for name, required in packages.items()]


def _extra(name: str, required: Sequence[str]) -> Extra:
    versions = {package: _installed(package) for package in required}
    missing = tuple(package for package, version in versions.items() if version is None)
    return Extra(name, {package: version for package, version in versions.items() if version is not None}, missing,
                 f"pip install -c constraints.txt '.[{name}]'" if missing else None)


def _choices(bundle: Path) -> dict[str, str]:
    """By precision that the bundle has, what would be used and why."""
    opened = open_bundle(bundle)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        try:
            options, why, _ = choose_backend(opened, Options(backend=AUTO, precision=precision))
            graph = opened.manifest.graph("image", options.graph_precision, options.target)
            found[precision] = why if graph is not None else "not in this bundle"
        except DcformerError as error:
            found[precision] = str(error)
    return found


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
