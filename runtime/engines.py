"""Engines of a bundle: what the record beside each says, and whether it may be loaded here.

Deserializing an engine runs the vendor's code on its bytes, and an engine is good only for the library version and the
GPUs that it was built for. So an engine is loaded only if its record says that it belongs to this bundle, this library
and this GPU, and its bytes are those that were recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dacite

from .bundle import RECORD_SUFFIX, Bundle, check_file
from .errors import BundleError, DcformerWarning, EngineRefused

#: What a graph for GPUs is made for: both libraries read it.
GPU_TARGET = "tensorrt"
LIBRARIES = ("tensorrt", "tensorrt_rtx")
SCHEMA_VERSION = 1
#: Major versions of TensorRT, of building and of running, across which version-compatible engines load. NVIDIA's
#: support matrix of 11.4.1 ("Engine Portability") names these and, too old for this project, those of 8 in 10, and says
#: that there are no others. Exceptions in its release notes are left to the library, which then refuses the engine.
#: https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/getting-started/support-matrix.html
_ACROSS_MAJORS = {(10, 11)}
#: Of ``EngineRecord.compute_capability``: any GPU from Ampere on. TensorRT-RTX builds for these by default, though
#: NVIDIA's support matrix names 8.6, 8.9 and 12.0 only: whether one in between loads is the library's to say.
PORTABLE = "8.0+"


@dataclass(frozen=True)
class Shapes:
    """An input's smallest, usual and largest shape in a profile."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine; ``dtype`` as numpy names it, -1 for an axis that varies."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """How many layers of one kind there are."""

    kind: str
    count: int


@dataclass(frozen=True)
class EngineRecord:
    """How an engine was made.

    ``engine``, ``onnx``, ``weights`` (of the ONNX file): files in the bundle, with their sha256.
    ``compute_capability``: GPUs that it runs on, such as "9.0"; "8.0+" for all from there on; several for an engine
    that holds code for each. ``gpu``: where it was built,
    None without one. ``profiles``: shapes by input. ``flags``: builder settings other than the library's defaults.
    ``layers``: of the network, before the library fuses it. ``activation_bytes``: what the preflight found to be alive
    at once at the largest profile, unfused; each request that runs has its own. ``engine_layers``: of the engine, after
    fusion, as the library's inspector names them, most common first; None if it was built on a machine that cannot run
    it, or before this field was there. Run with a faked inspector only.
    """

    schema_version: int
    engine: str
    sha256: str
    bytes: int
    role: str
    precision: str
    onnx: str
    onnx_sha256: str
    weights: str | None
    weights_sha256: str | None
    library: str
    version: str
    compute_capability: tuple[str, ...]
    gpu: str | None
    version_compatible: bool
    profiles: tuple[dict[str, Shapes], ...]
    flags: dict[str, Any]
    tensors: tuple[EngineTensor, ...]
    layers: tuple[Layer, ...]
    activation_bytes: int
    build_seconds: float
    built: str
    machine: str
    engine_layers: tuple[Layer, ...] | None = None

    @property
    def files(self) -> tuple[str, str]:
        """The engine, and this record."""
        return self.engine, f"{self.engine}.json"

    def to_json(self) -> str:
        """The text of the file beside the engine."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it. ``compute_capability``: such as "9.0"."""

    name: str
    compute_capability: str
    memory_bytes: int


def read_record(path: Path) -> EngineRecord:
    """A record from its file.

    Raises:
        BundleError: not a record, or of another version of this program.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise BundleError(f"{path}: not an engine record of version {SCHEMA_VERSION}; build the engine again")
        return dacite.from_dict(EngineRecord, content, dacite.Config(strict=True, cast=[tuple]))
    except (ValueError, dacite.DaciteError, TypeError) as error:
        raise BundleError(f"{path}: not an engine record ({error}); build the engine again") from error


def engine_records(bundle: Bundle) -> list[EngineRecord]:
    """Records of a bundle's engines, in the order of its files; one that is missing or damaged warns."""
    found = []
    for file in bundle.manifest.files:
        if file.path.endswith(RECORD_SUFFIX):
            try:
                check_file(bundle.root, file)
                found.append(read_record(bundle.root / file.path))
            except BundleError as error:
                warnings.warn(f"an engine is left out: {error}", DcformerWarning, stacklevel=2)
    return found


def find_engine(bundle: Bundle, role: str, precision: str, library: str, gpu: Gpu | None) -> EngineRecord:
    """The engine for a tower in a precision; of several, one that runs on the GPU.

    Raises:
        EngineRefused: none was built.
    """
    fitting = [record for record in engine_records(bundle)
               if (record.role, record.precision, record.library) == (role, precision, library)]
    if not fitting:
        raise EngineRefused(f"{bundle.folder}: no {library} engine of the {role} tower in {precision}; run: "
                            f"{build_command(bundle.folder, precision, library)}")
    return min(fitting, key=lambda record: gpu is None or not runs_on(record.compute_capability, gpu))


def runs_on(targets: tuple[str, ...], gpu: Gpu) -> bool:
    """Whether code for these compute capabilities runs on a GPU."""
    here = _version(gpu.compute_capability)
    return any(_version(target[:-1]) <= here if target.endswith("+") else _version(target) == here
               for target in targets)


def require_fitting(bundle: Bundle, record: EngineRecord, version: str, gpu: Gpu) -> None:
    """Compare a record with the bundle, the library and the GPU.

    Args:
        version: of the library that would load the engine.

    Raises:
        EngineRefused: made from another ONNX file, by another library version, or for another GPU.
    """
    command = build_command(bundle.folder, record.precision, record.library)
    where = f"{bundle.folder / record.engine}"
    files = {entry.path: entry for entry in bundle.manifest.files}
    sources = {record.onnx: record.onnx_sha256, record.weights: record.weights_sha256}
    for name, digest in sources.items():
        if name is not None and (name not in files or files[name].sha256 != digest):
            raise EngineRefused(f"{where}: built from another {name} than is there now; run: {command}")
    if not _loads(record, version):
        raise EngineRefused(f"{where}: built by {record.library} {record.version}, here is {version}; run: {command}, "
                            f"or install {record.library} {record.version}")
    if not runs_on(record.compute_capability, gpu):
        raise EngineRefused(f"{where}: built for compute capability {', '.join(record.compute_capability)}, this "
                            f"{gpu.name} has {gpu.compute_capability}; run on this machine: {command}")


def read_engine(bundle: Bundle, record: EngineRecord) -> bytes:
    """An engine's bytes, once they are those that were built: what is deserialized is what was hashed.

    Raises:
        EngineRefused: missing, or other bytes.
    """
    path = bundle.root / record.engine
    command = build_command(bundle.folder, record.precision, record.library)
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise EngineRefused(f"{path}: cannot be read ({error.strerror}); run: {command}") from error
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise EngineRefused(f"{path}: not the bytes that were built; copy the bundle again, or run: {command}")
    return plan


def build_command(folder: Path, precision: str, library: str) -> str:
    """What builds an engine."""
    return f"dcformer build {folder} --precision {precision} --engine-library {library}"


def _loads(record: EngineRecord, version: str) -> bool:
    """Version-compatible engines load in later releases; others, TensorRT-RTX's among them, in the very same."""
    if record.version == version:
        return True
    built, here = _version(record.version), _version(version)
    majors = (*built[:1], *here[:1])
    return record.version_compatible and built <= here and (built[:1] == here[:1] or majors in _ACROSS_MAJORS)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
