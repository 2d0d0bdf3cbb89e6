"""The page of one scan: what it looks like, its scores, where the encoder looked, how it was read, by what."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, suggestion
from ..machine import machine
from ..model import Model
from ..occlusion import Occlusion, occlude
from ..results import Scores
from ..scan_files import sha256_scan
from ..volume import ReadOptions, Volume, preprocess, read_scan
from ..volume.options import in_mm
from .page import write_page
from .pictures import block_row, scan_rows

#: Findings that the occlusion is shown of, where none are named.
_SHOWN = 3
_STRONGEST = 3


@dataclass(frozen=True)
class PageOptions:
    """What a page shows.

    ``title``: None names the scan by its content, as a file's name may name the patient. ``classes``: as in
    ``Model.zero_shot``. ``explain``: those whose blocks are shown, empty for the three of the highest scores.
    ``most_blocks``: of the occlusion; None leaves it out. ``read_options``: as in ``Model.preprocess``.
    """

    title: str | None = None
    classes: Sequence[str] | None = None
    explain: Sequence[str] = ()
    most_blocks: int | None = 256
    read_options: Mapping[str, Any] = field(default_factory=dict)


def write_scan_page(model: Model, path: Path, out: Path, options: PageOptions,
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
    for name in options.explain:
        if name not in known:
            raise InputError(f"explain: no class {name!r}{suggestion(name, known)}; the classes are {', '.join(known)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = _score(model, path, options)
        volume = read_scan(path, spec, ReadOptions(**options.read_options))
    told = list(dict.fromkeys(str(one.message) for one in caught))
    for text in told:
        warnings.warn(next(one.message for one in caught if str(one.message) == text), stacklevel=2)
    ranked = sorted(result.scores, key=lambda name: -result.scores[name])
    found, looked = None, None
    if options.most_blocks is not None:
        prepared = model.prepare(path, **options.read_options)
        found = occlude(model, prepared, options.classes, options.most_blocks, on_block)
        looked = _looked(model, volume, found, options.explain or ranked[:_SHOWN])
    digest = sha256_scan(path)
    task = model.manifest.zero_shot
    write_page(
        out, "scan.html", title=options.title or f"Scan {digest[:12]}", trained=model.manifest.source.trained,
        meaning=_meaning(model), prompted=task is not None,
        scores=[{"name": name, "score": result.scores[name], "prompts": task.prompts(name) if task else ()}
                for name in ranked],
        slices=scan_rows(volume, spec.intensity == "window"), looked=looked,
        # Messages begin with the path, which may name the patient.
        warnings=[text.replace(str(path), "scan") for text in told],
        reading=_reading(volume, digest, options.read_options), model=_model(model),
        timings=[(phase, f"{ms:,.0f} ms") for phase, ms in result.timings_ms.items()])
    return result, found


def _class_names(model: Model, options: PageOptions) -> Sequence[str]:
    if options.classes is not None:
        return options.classes
    task = model.manifest.zero_shot or model.manifest.detector
    return task.classes if task is not None else ()


def _score(model: Model, path: Path, options: PageOptions) -> Scores:
    if model.manifest.zero_shot is None and model.manifest.detector is not None:
        if options.classes is not None:
            raise InputError("classes: this bundle is a detector with classes of its own; pass none")
        return model.classify(path, **options.read_options)
    return model.zero_shot(path, options.classes, **options.read_options)


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
                     "pictures": block_row(seen, volume.orientation, spec, found, name), "told": _told(found, name)}
                    for name in names]}


def _told(found: Occlusion, name: str) -> str:
    effects = [effect for _, effect in found.strongest(name, _STRONGEST)]
    lowest = float(found.effect[..., found.classes.index(name)].min())
    if effects[0] <= 0:
        return "No block speaks for it: hiding any raises the score or leaves it as it is."
    return (f"Without the block outlined in white the log-odds fall by {effects[0]:.3f}; without the next "
            f"{', '.join(f'{effect:.3f}' for effect in effects[1:])}. Strongest against it: {lowest:.3f}.")


def _reading(volume: Volume, digest: str, read_options: Mapping[str, Any]) -> list[tuple[str, str]]:
    maps = ", then ".join(map(str, volume.scaling))
    given = ", ".join(f"{name} {value}" for name, value in read_options.items() if name != "metadata")
    return [("sha256 of the scan", digest), ("voxels (H x W x D)", " x ".join(map(str, volume.stored.shape))),
            ("spacing (H x W x D)", in_mm(volume.spacing_hwd_mm)), ("orientation", volume.orientation),
            ("stored values", str(volume.stored.dtype)), ("to Hounsfield units", maps or "none"),
            ("done to it", "; ".join(volume.notes) or "nothing"),
            ("said by the caller", given or "nothing")]


def _model(model: Model) -> list[tuple[str, str]]:
    manifest = model.manifest
    spec = manifest.preprocessing
    return [("encoder", manifest.encoder), ("weights", str(manifest.source)), ("bundle's sha256", manifest.digest),
            ("reads", f"{' x '.join(map(str, spec.shape_dhw))} (D x H x W)"
             + (f" voxels of {in_mm(spec.spacing_hwd_mm)} (H x W x D)" if spec.resampling == "to_spacing" else "")),
            ("ran in", f"{model.describe()}, {model.precision}"), ("machine", machine()),
            ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))]
