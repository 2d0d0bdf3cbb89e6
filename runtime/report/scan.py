"""The page of one scan: what it looks like, its scores, where the encoder looked, how it was read, by what."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, suggestion
from ..machine import machine
from ..manifest import Preprocessing
from ..model import Model
from ..occlusion import Occlusion, occlude
from ..results import Prepared, Scores
from ..scan_files import ScanPath, file_facts, sha256_scan
from ..volume import ReadOptions, Volume, preprocess, read_scan
from ..volume.options import AS_STORED, in_mm
from .page import write_page
from .pictures import block_row, scan_rows

#: Findings that the occlusion is shown of, where none are named.
_SHOWN = 3
_STRONGEST = 3


@dataclass(frozen=True)
class PageOptions:
    """What a page shows.

    ``title``: None names the scan by its sha256, as a file's name may name the patient. ``classes``: as in
    ``Model.zero_shot``. ``explain``: those whose blocks are shown, empty for the three of the highest scores.
    ``most_blocks``: of the occlusion; None leaves it out. ``read_options``: as in ``Model.preprocess``.
    """

    title: str | None = None
    classes: Sequence[str] | None = None
    explain: Sequence[str] = ()
    most_blocks: int | None = 256
    read_options: Mapping[str, Any] = field(default_factory=dict)


def write_scan_page(model: Model, path: ScanPath, out: Path, options: PageOptions,
                    on_block: Callable[[int, int], None] = lambda done, of: None) -> tuple[Scores, Occlusion | None]:
    """Score a scan and write its page.

    Args:
        on_block: as in ``occlude``.

    Returns:
        The scores and the effects that the page shows.

    Raises:
        InputError: the scan cannot be used, an unknown class to explain, a file that cannot be written.
        BundleError: a bundle with neither prompts nor a detector.
    """
    spec = model.manifest.preprocessing
    known = _class_names(model, options)
    explained = list(dict.fromkeys(_named(name, known) for name in options.explain))
    facts, timings = file_facts(path), {}
    start = time.perf_counter()
    volume = read_scan(path, spec, ReadOptions(**options.read_options))
    timings["read"] = (time.perf_counter() - start) * 1e3
    prepared = model.prepare_volume(volume, "scan", timings)
    result = _score(model, prepared, options)
    read_ms = sum(timings.values())
    timings = {**timings, **result.timings_ms, "total": read_ms + result.timings_ms["total"]}
    ranked = sorted(result.scores, key=lambda name: -result.scores[name])
    found, looked = None, None
    if options.most_blocks is not None:
        found = occlude(model, prepared, options.classes, options.most_blocks, on_block)
        looked = _looked(model, volume, found, explained or ranked[:_SHOWN])
    digest = sha256_scan(path)
    if file_facts(path) != facts:
        raise InputError(f"{path}: changed while its page was made; wait until it is written, then make it again")
    task = model.manifest.zero_shot
    write_page(
        out, "scan.html", title=options.title or f"Scan {digest[:12]}", trained=model.manifest.source.trained,
        meaning=_meaning(model), prompted=task is not None, known=volume.orientation != AS_STORED,
        scores=[{"name": name, "score": result.scores[name], "prompts": task.prompts(name) if task else ()}
                for name in ranked],
        slices=scan_rows(volume, spec.intensity == "window"), looked=looked, notes=volume.notes,
        reading=_reading(volume, spec, digest, options.read_options), model=_model(model),
        timings=[(phase, f"{ms:,.0f} ms") for phase, ms in timings.items()])
    return replace(result, timings_ms=timings), found


def _named(name: str, known: Sequence[str]) -> str:
    """The class that is meant, whatever its capitals."""
    if name in known:
        return name
    alike = [one for one in known if one.casefold() == name.casefold()]
    if len(alike) != 1:
        raise InputError(f"--explain: no class {name!r}; the classes are {', '.join(known)}{suggestion(name, known)}")
    return alike[0]


def _class_names(model: Model, options: PageOptions) -> Sequence[str]:
    if options.classes is not None:
        return options.classes
    task = model.manifest.zero_shot or model.manifest.detector
    return task.classes if task is not None else ()


def _score(model: Model, scan: Prepared, options: PageOptions) -> Scores:
    if model.manifest.zero_shot is None and model.manifest.detector is not None:
        if options.classes is not None:
            raise InputError("classes: this bundle is a detector with classes of its own; pass none")
        return model.classify(scan)
    return model.zero_shot(scan, options.classes)


def _meaning(model: Model) -> str:
    task = model.manifest.zero_shot
    if task is None:
        return "Probabilities of a fine-tuned detector, highest first. Dashed: one half."
    if task.score == "softmax_over_pair":
        return ("How much nearer the scan is to the first prompt than to the second (softmax of their cosines times "
                f"{task.similarity_scale:.3g}), highest first. Dashed: one half, as near to the one as to the other. "
                "These are no calibrated risks: compare scans, not findings.")
    return ("Sigmoid of the cosine with each prompt, scaled and shifted as trained, highest first. Dashed: one half. "
            "These are no calibrated risks: compare scans, not findings.")


def _looked(model: Model, volume: Volume, found: Occlusion, names: Sequence[str]) -> dict[str, Any]:
    spec = model.manifest.preprocessing
    seen = preprocess(volume, spec)
    depth, height, width = found.block_dhw
    sh, sw, sd = spec.spacing_hwd_mm
    millimetres = f"{height * sh:.0f} x {width * sw:.0f} x {depth * sd:.0f} mm"
    return {
        "inferences": found.inferences, "block": f"{height} x {width} x {depth}",
        "block_mm": millimetres if spec.resampling == "to_spacing" else "equal size",
        "cell": None if found.cell_dhw is None else "{1} x {2} x {0}".format(*found.cell_dhw),
        "classes": [{"name": name, "score": float(found.scores[found.classes.index(name)]),
                     "pictures": block_row(seen, volume, spec, found, name) if _largest(found, name) else [],
                     "told": _told(found, name)} for name in names]}


def _largest(found: Occlusion, name: str) -> float:
    return float(np.abs(found.effect[..., found.classes.index(name)]).max())


def _told(found: Occlusion, name: str) -> str:
    effects = [effect for _, effect in found.strongest(name, _STRONGEST) if effect > 0]
    lowest = float(found.effect[..., found.classes.index(name)].min())
    if not _largest(found, name):
        return "Hiding any block leaves the score as it is: the encoder saw nothing here that it goes by."
    against = f" Strongest against it: {lowest:.3f}." if lowest < 0 else " No block speaks against it."
    against += f" Full colour: {_largest(found, name):.3f}."
    if not effects:
        return f"No block speaks for it: hiding any raises the score or leaves it as it is.{against}"
    others = f"; without the next {', '.join(f'{effect:.3f}' for effect in effects[1:])}" if effects[1:] else ""
    return f"Without the block that speaks most for it the log-odds fall by {effects[0]:.3f}{others}.{against}"


def _reading(volume: Volume, spec: Preprocessing, digest: str, read_options: Mapping[str, Any]
             ) -> list[tuple[str, str]]:
    maps = ", then ".join(map(str, volume.scaling))
    # Of a table its name, and of a series its UID, may lead to the patient.
    hidden = {"metadata": "spacing, slope and intercept from a table", "series": "which series"}
    given = ", ".join(hidden.get(name, f"{name} {value}") for name, value in read_options.items())
    return [("sha256, as in stores", digest), ("voxels (H x W x D)", " x ".join(map(str, volume.stored.shape))),
            ("spacing (H x W x D)", in_mm(volume.spacing_hwd_mm)), *_extent(volume, spec),
            ("orientation", volume.orientation),
            ("orientation in the file", volume.stored_orientation or "not told"),
            ("stored values", str(volume.stored.dtype)), ("to Hounsfield units", maps or "none"),
            ("done to it, or odd", "what stands above" if volume.notes else "nothing"),
            ("said by the caller", given or "nothing")]


def _extent(volume: Volume, spec: Preprocessing) -> list[tuple[str, str]]:
    """How much of the scan the encoder sees, where it does not see all."""
    if spec.resampling != "to_spacing":
        return []
    depth, height, width = spec.shape_dhw
    seen = [side * mm for side, mm in zip((height, width, depth), spec.spacing_hwd_mm, strict=True)]
    whole = [side * mm for side, mm in zip(volume.stored.shape, volume.spacing_hwd_mm, strict=True)]
    told = f"{' x '.join(f'{mm:.0f}' for mm in whole)} mm"
    if any(there > read + 1 for there, read in zip(whole, seen, strict=True)):
        told += f", of which the encoder reads the middle {' x '.join(f'{mm:.0f}' for mm in seen)} mm"
    return [("extent (H x W x D)", told)]


def _model(model: Model) -> list[tuple[str, str]]:
    manifest = model.manifest
    spec = manifest.preprocessing
    weights = manifest.source.sha256
    return [("encoder", manifest.encoder),
            ("weights", str(manifest.source) if weights is None else f"sha256 {weights}"),
            ("bundle's sha256", manifest.digest),
            ("reads", f"{' x '.join(map(str, spec.shape_dhw))} (D x H x W)"
             + (f" voxels of {in_mm(spec.spacing_hwd_mm)} (H x W x D)" if spec.resampling == "to_spacing" else "")),
            ("ran in", f"{model.describe()}, {model.precision}"), ("machine", machine()),
            ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))]
