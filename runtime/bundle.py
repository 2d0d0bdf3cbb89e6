"""Open and write bundles: a folder whose every file is named, sized and hashed in its manifest."""

from __future__ import annotations

import os
import shutil
import warnings
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BundleError, DcformerWarning, InputError
from .files import require_writable_file, require_writable_folder, sha256_file
from .manifest import MANIFEST_NAME, PRECISIONS, FileRecord, Manifest

_LARGEST_MANIFEST_BYTES = 16 << 20
_CHANGED = "changed since the bundle was opened; load it again"
ENGINE_SUFFIX = ".engine"
RECORD_SUFFIX = ".engine.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest.

    ``folder``: as it was named, for messages. ``seen`` identifies each file as it was when checked. ``root``: the
    folder from wherever the process goes.
    """

    folder: Path
    manifest: Manifest
    seen: Mapping[str, tuple[int, ...]]
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.folder.absolute())

    def path(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: the file is no longer the one that was checked, for example because someone exported anew.
        """
        path = self.root / name
        if not path.exists():
            raise BundleError(f"{self.folder / name}: no longer there; load the bundle again")
        if _identity(path.stat()) != self.seen[name]:
            raise BundleError(f"{self.folder / name}: {_CHANGED}")
        return path

    def hold(self, name: str) -> HeldFile:
        """A file that the manifest lists, to be asked later. Raises ``BundleError`` as ``path``."""
        return HeldFile(self.path(name), self.folder / name, self.seen[name])


class HeldFile:
    """A file that a library has mapped into memory, and must not change for as long.

    Held open: a file that was put in its place leaves it what it was.
    """

    def __init__(self, path: Path, name: Path, identity: tuple[int, ...]) -> None:
        self._name, self._identity = name, identity
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BundleError(f"{name}: cannot be opened ({error.strerror}); load the bundle again") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Raise BundleError if something was written into the file."""
        try:
            same = _identity(os.fstat(self._descriptor)) == self._identity
        except OSError:  # another machine has replaced it on a network's file system
            same = False
        if not same:
            raise BundleError(f"{self._name}: {_CHANGED}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def is_engine_file(name: str) -> bool:
    """An engine or its record: a bundle is good without them, and they can be built again."""
    return name.endswith((ENGINE_SUFFIX, RECORD_SUFFIX))


def open_bundle(folder: str | Path, verify: bool = True, engines: bool = False) -> Bundle:
    """Open a bundle and check that nothing in it is missing, truncated or changed.

    Args:
        verify: compare the sha256 of every file; sizes are compared in any case.
        engines: check engines, too; else each is when it is read, and a damaged one harms nothing but itself.

    Raises:
        InputError: no such folder.
        BundleError: not a bundle, damaged, edited, or written by a newer version.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such bundle")
    if not folder.is_dir():
        raise BundleError(f"{folder}: a bundle is a folder; this is a file")
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST_NAME}; not a bundle. `dcformer export` makes one")
    if manifest_path.stat().st_size > _LARGEST_MANIFEST_BYTES:
        raise BundleError(f"{manifest_path}: larger than {_LARGEST_MANIFEST_BYTES} bytes; not a manifest")
    try:
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{manifest_path}: not UTF-8 text; the file is damaged") from error
    except BundleError as error:
        raise BundleError(f"{manifest_path}: {error}") from error
    seen = {}
    for record in manifest.files:
        if is_engine_file(record.path) and not engines:
            continue
        path = folder / record.path
        before = _identity(path.stat()) if path.exists() else ()
        check_file(folder, record, verify)
        seen[record.path] = before
    return Bundle(folder, manifest, seen)


def check_file(folder: Path, record: FileRecord, verify: bool = True) -> None:
    """Compare a file with what the manifest says of it.

    Args:
        verify: by its sha256, too.

    Raises:
        BundleError: missing, another size or content, or a link that leaves the bundle.
    """
    path = folder / record.path
    if is_engine_file(record.path):
        again = "build"
    else:  # `dcformer calibrate` adds those of other precisions and what it observed, to a bundle that is intact
        again = "export and calibrate" if set(record.path.split(".")) & {*PRECISIONS[1:], "calibration"} else "export"
    if not path.is_file():
        raise BundleError(f"{path}: missing; the bundle is incomplete. Copy it again or {again} it again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: a link that leaves the bundle; refused")
    if (size := path.stat().st_size) != record.bytes:
        raise BundleError(f"{path}: {size} bytes, the manifest says {record.bytes}; truncated or edited. "
                          f"Copy it again or {again} it again")
    if verify and (digest := sha256_file(path)) != record.sha256:
        raise BundleError(f"{path}: sha256 is {digest[:12]}…, the manifest says {record.sha256[:12]}…; damaged or "
                          f"edited. Copy it again or {again} it again")


def record_file(folder: Path, name: str) -> FileRecord:
    """Describe a file just written into a bundle."""
    path = folder / name
    return FileRecord(path=name, sha256=sha256_file(path), bytes=path.stat().st_size)


def copy_files(bundle: Bundle, folder: Path, without: Collection[str]) -> list[str]:
    """Copy a bundle's files into a folder; returns the names. A damaged engine is left out with a warning.

    Copies, not links: onnx refuses weights of several names, as links may lead where they should not.
    """
    records = {record.path: record for record in bundle.manifest.files if record.path not in without}
    for name, record in list(records.items()):
        if not is_engine_file(name):
            continue
        try:
            check_file(bundle.folder, record)
        except BundleError as error:
            engine = name.removesuffix(".json")
            if engine in records or f"{engine}.json" in records:
                warnings.warn(f"{engine} is left out: {error}", DcformerWarning, stacklevel=2)
            for part in (engine, f"{engine}.json"):
                records.pop(part, None)
    for name in records:
        shutil.copyfile(bundle.folder / name if is_engine_file(name) else bundle.path(name), folder / name)
    return list(records)


def require_unchanged(bundle: Bundle) -> None:
    """Call before a bundle is replaced by what was made of it.

    Raises:
        BundleError: someone else replaced it meanwhile, whose work would be lost.
    """
    path = bundle.folder / MANIFEST_NAME
    if not path.is_file() or Manifest.from_json(path.read_text(encoding="utf-8")).digest != bundle.manifest.digest:
        raise BundleError(f"{bundle.folder}: changed while this was running; nothing was written, run it again")


def require_writable_bundle(bundle: Bundle) -> None:
    """Call before long work whose result replaces a bundle.

    Raises:
        InputError: the folder, or the one that it lies in, may not be written.
    """
    require_writable_file(bundle.folder / MANIFEST_NAME)
    require_writable_folder(bundle.folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; call it last, into a folder that is not yet under its final name."""
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
