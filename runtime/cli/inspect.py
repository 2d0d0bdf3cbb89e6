"""``dcformer inspect``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from ..bundle import open_bundle
from ..manifest import ANY_TARGET, Manifest
from ..provenance import Rewrite
from .options import bundle_argument, json_option
from .output import print_json, print_table


@click.command("inspect")
@bundle_argument
@click.option("--no-verify", is_flag=True, help="Compare sizes only, not the sha256 of every file.")
@json_option
def command(bundle: Path, no_verify: bool, as_json: bool) -> None:
    """Show what BUNDLE holds, and check that no file is missing, truncated or changed."""
    manifest = open_bundle(bundle, verify=not no_verify, engines=True).manifest
    if as_json:
        print_json(json.loads(manifest.to_json()))
        return
    print_table(str(bundle), ("", "value"), _facts(manifest))
    print_rewrites(manifest)
    print_conversions(manifest)
    print_table("Files", ("file", "bytes", "sha256"),
                ((f.path, f"{f.bytes:,}", f.sha256[:16]) for f in manifest.files))
    print_agreement(manifest)
    click.echo("intact: sizes match" if no_verify else "intact: every file matches its sha256")


def print_agreement(manifest: Manifest) -> None:
    """How far the graphs were from PyTorch when the bundle was made."""
    print_table(
        "Difference from PyTorch fp32",
        ("graph, output", "input", "largest relative error", "tolerance", "1 - cosine", "codes equal"),
        ((f"{a.graph}, {a.output}", a.input, f"{a.max_relative_error:.1e}", f"{a.tolerance:.0e}",
          f"{max(0.0, 1 - a.cosine):.1e}", "-" if a.codes_equal is None else f"{a.codes_equal:.2%}")
         for a in manifest.agreement),
    )


def print_conversions(manifest: Manifest) -> None:
    """How graphs of lower precisions were made; nothing where there are none."""
    if manifest.conversions:
        print_table("Precisions", ("", "method", "scans", "INT8 layers", "notes"), (
            (c.precision, c.method or "-", c.scans, c.layers or "-", "; ".join(c.notes) or "-")
            for c in manifest.conversions))


def print_rewrites(manifest: Manifest) -> None:
    """What each exact rewrite did to the image tower, and why it did nothing where it did not."""

    def change(before: float, after: float, unit: float, digits: int) -> str:
        old, new = (f"{value / unit:,.{digits}f}" for value in (before, after))
        return old if before == after else f"{old} -> {new}"

    print_table(
        "Rewrites of the image tower (batch 1)",
        ("rule", "for", "places", "nodes", "G multiply-adds", "GB moved", "note"),
        ((r.rule, r.target, r.matched, change(r.before.nodes, r.after.nodes, 1, 0),
          change(r.before.multiply_adds, r.after.multiply_adds, 1e9, 2),
          change(r.before.bytes_moved, r.after.bytes_moved, 1e9, 2), _note(r)) for r in manifest.rewrites),
    )


def _note(rewrite: Rewrite) -> str:
    """What was measured, or each reason to leave places alone once, with their number."""
    timing, disturbed = rewrite.measured, ""
    if timing is not None and timing.is_disturbed:
        disturbed = f"; measured while other programs used {timing.others:.0%} of the machine"
    if rewrite.matched and timing is not None:
        return f"faster, {timing.after_ms:.0f} instead of {timing.before_ms:.0f} ms{disturbed}"
    counted = Counter(text.split(": ", 1)[1] for text in rewrite.refused)
    return "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in counted.items()) + disturbed


def _facts(m: Manifest) -> list[tuple[str, str]]:
    p = m.preprocessing
    return [
        ("encoder", f"{m.encoder}, {m.parameters / 1e6:.2f} M parameters in the encoder, reduction {m.reduction}"),
        ("volume (D, H, W)", " x ".join(map(str, p.shape_dhw))),
        ("spacing (H, W, D)", " x ".join(f"{mm:g}" for mm in p.spacing_hwd_mm) + " mm" if
         p.resampling == "to_spacing" else "any; stretched to the volume"),
        ("intensity", f"{p.window_hu[0]:g} to {p.window_hu[1]:g} HU, (v + {p.offset_hu:g}) / {p.scale_hu:g}" if
         p.intensity == "window" else "the scan's minimum to maximum, as 0 to 1"),
        ("orientation", p.orientation),
        ("graphs", ", ".join(f"{g.role} {g.precision}{'' if g.target == ANY_TARGET else f' for {g.target}'} "
                             f"(opset {g.opset})" for g in m.graphs)),
        ("texts", f"at most {m.text.max_tokens} tokens" if m.text else "no tokenizer"),
        ("zero-shot classes", f"{len(m.zero_shot.classes)}, {m.zero_shot.score}" if m.zero_shot else "none"),
        ("detector classes", str(len(m.detector.classes)) if m.detector else "none"),
        ("weights", str(m.source)),
        ("licence of the weights", m.source.license or "not stated"),
        ("made", f"{m.created} with " + ", ".join(f"{k} {v}" for k, v in m.tools.items())),
    ]
