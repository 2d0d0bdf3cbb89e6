"""``dcformer encoders``."""

from __future__ import annotations

import click

from .options import json_option
from .output import print_json, print_table


@click.command("encoders")
@json_option
def command(as_json: bool) -> None:
    """List the encoders: parameters (millions) and GFLOPs beside the published figures and the difference.

    GFLOPs are multiply-accumulates with norm layers in training mode, as published. Parameters include the projection
    to the joint space where the published figure does (marked +).
    """
    from ...export.complexity import table

    rows = table()
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    columns = ("encoder", "volume", "params (M)", "published", "diff", "GFLOPs", "published", "diff", "F1 (%)")
    print_table("Encoders; params with + include the projection; F1: published, zero-shot", columns, (
        (row.name, f"{row.input_size}x{row.input_size}x{row.input_size // 2}",
         f"{row.params_m:.2f}{'+' * row.includes_projection}", *_published(row.params_m, row.published_params_m),
         f"{row.gflops:.2f}", *_published(row.gflops, row.published_gflops),
         "-" if row.published_f1 is None else f"{row.published_f1:.1f}")
        for row in rows
    ))


def _published(counted: float, published: float | None) -> tuple[str, str]:
    """The published figure and what it is more than the counted one, to two digits."""
    if published is None:
        return "-", "-"
    difference = round(published - counted, 2)
    return f"{published:g}", f"{difference:+.2f}" if difference else "0"
