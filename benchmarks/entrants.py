"""Whom ``dcformer bench BUNDLE --against`` lets run beside a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..runtime.backends import Options
from ..runtime.backends.openvino import NO_BFLOAT16, has_bfloat16
from ..runtime.bundle import open_bundle
from ..runtime.engines import LIBRARIES
from ..runtime.errors import DcformerWarning, InputError, suggestion
from ..runtime.manifest import MANIFEST_NAME, Manifest
from ..runtime.scan_files import ScanPath
from .contenders import Entrant, Job, bundle, loading, pytorch_eager

#: The bundle itself, which always runs.
OWN = "onnxruntime"
#: Why it is missing where the scan is DICOM, or prepared.
NIFTI_ALONE = "the original code reads NIfTI alone, so PyTorch is not measured beside the bundle"
#: The export that any tool would make.
_NAIVE = "naive"


@dataclass(frozen=True)
class _Kind:
    """``export``: which export of the weights is run, "naive" or for a target; None for the bundle as it is."""

    kind: str
    export: str | None = None
    backend: str = "onnxruntime"
    precision: str = "fp32"


_KINDS = {
    "torch": _Kind(pytorch_eager.KIND),
    "onnx-naive": _Kind(bundle.KIND, _NAIVE),
    OWN: _Kind(bundle.KIND),
    "openvino-naive": _Kind(bundle.KIND, _NAIVE, "openvino"),
    "openvino": _Kind(bundle.KIND, "openvino", "openvino"),
    "openvino-bf16": _Kind(bundle.KIND, "openvino", "openvino", "bf16"),
    "onnxruntime-int8": _Kind(bundle.KIND, precision="int8"),
    "openvino-int8": _Kind(bundle.KIND, backend="openvino", precision="int8"),
}
NAMES = tuple(_KINDS)


@dataclass(frozen=True)
class Field:
    """Where a race takes place: a bundle, the checkpoint it was made from if there is one, threads, a scan."""

    bundle: Path
    checkpoint: Path | None
    threads: int
    scan: ScanPath | None = None

    @property
    def suits_original(self) -> bool:
        """Whether the original code could read the scan, if there is one."""
        return self.scan is None or (isinstance(self.scan, Path) and self.scan.name.endswith((".nii", ".nii.gz")))

    @cached_property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return open_bundle(self.bundle).manifest


def choose_entrants(names: Sequence[str], field: Field, folder: Path,
                    on_stage: Callable[[str], None] = lambda _: None) -> list[Entrant]:
    """Entrants of these names, in their order, and the bundle itself at the end if it is not among them.

    One that this CPU has no units for is left out, with a warning.

    Args:
        folder: where other exports of the bundle's weights are made.

    Raises:
        InputError: no such name, one named twice, or weights that are not at hand.
    """
    for index, name in enumerate(names):
        if name not in _KINDS:
            raise InputError(f"--against {name!r}: unknown{suggestion(name, _KINDS)}; the names are {', '.join(NAMES)}")
        if name in names[:index]:
            raise InputError(f"--against: {name} is named twice")
    manifest = field.manifest
    same_weights = field.checkpoint is not None or manifest.source.random_seed is not None
    job = Job(str(field.bundle), str(field.checkpoint) if field.checkpoint else None, field.threads, same_weights,
              manifest.preprocessing.value_range, scan=field.scan)
    entrants = []
    for name in (*names, *[OWN] * (OWN not in names)):
        kind = _KINDS[name]
        if kind.kind == pytorch_eager.KIND and not field.suits_original:
            raise InputError(f"--against {name}: the original code reads NIfTI alone; name others, or pass a .nii or "
                             ".nii.gz")
        options = Options(backend=kind.backend, precision=kind.precision)
        if kind.precision == "bf16" and not has_bfloat16():
            warnings.warn(f"--against {name}: left out; {NO_BFLOAT16}", DcformerWarning, stacklevel=2)
            continue
        if manifest.graph("image", options.graph_precision, kind.backend) is None:
            raise InputError(f"--against {name}: {field.bundle} has no {kind.precision} graph; `dcformer calibrate` "
                             "adds it")
        made = field.bundle
        has_own = any(graph.target == kind.export for graph in manifest.graphs)
        if kind.export is not None and not has_own:
            made = _export_again(field, manifest, kind.export, folder, on_stage)
        entrants.append(Entrant(name, kind.kind, replace(job, bundle=str(made), backend=kind.backend,
                                                        precision=kind.precision)))
    return entrants


def loading_entrants(field: Field) -> list[Entrant]:
    """Reading and preprocessing alone: the original's method and ours. Raises InputError if it cannot read the scan."""
    if not field.suits_original:
        raise InputError(f"--load-only {field.scan}: the original code, which runs beside, reads NIfTI alone; pass a "
                         ".nii or .nii.gz")
    job = Job(str(field.bundle), None, field.threads, same_weights=True, scan=field.scan)
    return [Entrant("original", loading.ORIGINAL_KIND, job), Entrant("ours", loading.KIND, job)]


def gpu_entrants(names: Sequence[str], field: Field) -> list[Entrant]:
    """From a preprocessed volume, or from a scan's file, on the GPU: PyTorch eager in float32, and engines.

    Args:
        names: of ``benchmarks.gpu.contenders.names_of``; others than engines and "torch-fp32", where it can read the
            scan, are left out.
    """
    manifest = field.manifest
    job = Job(str(field.bundle), str(field.checkpoint) if field.checkpoint else None, field.threads,
              field.checkpoint is not None or manifest.source.random_seed is not None,
              manifest.preprocessing.value_range, scan=field.scan, device="cuda")
    entrants = []
    for name in names:
        library, _, precision = name.rpartition("-")
        if name == "torch-fp32" and field.suits_original:
            entrants.append(Entrant(name, pytorch_eager.KIND, job))
        elif library in LIBRARIES:
            engine = replace(job, backend=library, precision=precision)
            entrants.append(Entrant(name, bundle.KIND, engine))
            if field.scan is not None:
                entrants.append(Entrant(f"{name}, preprocessed on the GPU", bundle.KIND,
                                        replace(engine, preprocess="gpu")))
    return entrants


def _export_again(field: Field, manifest: Manifest, export: str, folder: Path,
                  on_stage: Callable[[str], None]) -> Path:
    """The bundle's weights, exported without rewrites or for another target."""
    # Here, because a bundle alone is measured where PyTorch is not installed, too.
    from ..export.make_bundle import ExportOptions, export_checkpoint, export_random_weights
    from ..export.rules.pipeline import RULE_NAMES

    out = folder / export
    if (out / MANIFEST_NAME).exists():
        return out
    on_stage(f"exporting again: {export}")
    options = ExportOptions(None, input_size=manifest.input_size, reduction=manifest.reduction)
    naive = export == _NAIVE
    options = replace(options, without_rewrites=RULE_NAMES) if naive else replace(options, targets=(export,))
    if (seed := manifest.source.random_seed) is not None:
        export_random_weights(manifest.encoder, seed, out, options)
    elif field.checkpoint is not None:
        tokenizer = _tokenizer_of(field, manifest, folder)
        export_checkpoint(field.checkpoint, out, replace(options, tokenizer=tokenizer))
    else:
        raise InputError(f"--against needs other exports of {field.bundle}; pass --checkpoint, the file it was made "
                         "from")
    return out


def _tokenizer_of(field: Field, manifest: Manifest, folder: Path) -> Path | None:
    """The bundle's own tokenizer, in a folder as the export wants it."""
    if manifest.text is None:
        return None
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_bytes((field.bundle / manifest.text.file).read_bytes())
    return tokenizer
