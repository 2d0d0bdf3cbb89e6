"""``dcformer encoders``."""

from __future__ import annotations

import click

from .options import json_option
from .output import print_json, print_table


@click.command("encoders")
@json_option
def command(as_json: bool) -> None:
    """List the encoders: parameters (millions) and GFLOPs at 512x512x256 beside the published figures.

    GFLOPs are multiply-accumulates with norm layers in training mode, as published. Parameters include the projection
    to the joint space where the published figure does.
    """
    from ...export.complexity import table

    rows = table()
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    columns = ("encoder", "params (M)", "published", "with projection", "GFLOPs", "published", "published F1 (%)")
    print_table("Encoders at 512x512x256", columns, (
        (row.name, f"{row.params_m:.2f}", _or_dash(row.published_params_m), "yes" if row.includes_projection else "no",
         f"{row.gflops:.2f}", _or_dash(row.published_gflops), _or_dash(row.published_f1))
        for row in rows
    ))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
