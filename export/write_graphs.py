"""The traced towers as a bundle's ONNX files: rewritten, made fast on back ends, with their weights beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from ..runtime.backends import Options
from ..runtime.manifest import Graph
from ..runtime.provenance import Rewrite
from .graph_files import WeightsFile, describe_graph
from .rules.measured import Stopwatch
from .rules.pipeline import MEASURED, RULE_NAMES, optimize

IMAGE_FILE = "image.fp32.onnx"
IMAGE_WEIGHTS = "image.fp32.weights"
TEXT_FILE = "text.fp32.onnx"
TEXT_WEIGHTS = "text.fp32.weights"
_FUSING_TARGET = "onnxruntime"
#: 18 pairs of prompts, a dozen tokens each: what the text tower is for.
_PROMPTS = {"batch": 36, "sequence": 12}


def write_image_graphs(traced: onnx.ModelProto, folder: Path, without: Collection[str],
                       targets: Sequence[str]) -> tuple[list[Graph], list[Rewrite]]:
    """The graph that is good anywhere, and one for each back end where rewrites that are measured pay.

    Args:
        without: names of rewrite rules not to apply.
        targets: names of back ends.
    """
    weights = WeightsFile(folder / IMAGE_WEIGHTS)
    proto, rewrites = optimize(traced, (*without, *MEASURED))
    weights.save(proto, folder / IMAGE_FILE)
    graphs = [describe_graph("image", folder / IMAGE_FILE, weights=IMAGE_WEIGHTS)]
    others = [name for name in RULE_NAMES if name not in MEASURED]
    for target in targets:
        fast, reports = optimize(proto, (*without, *others), Stopwatch(Options(backend=target)))
        rewrites += [dataclasses.replace(report, target=target) for report in reports]
        if any(report.matched for report in reports):
            path = folder / f"image.fp32.{target}.onnx"
            weights.save(fast, path)
            graphs.append(describe_graph("image", path, target=target, weights=IMAGE_WEIGHTS))
    return graphs, rewrites


def write_text_graphs(traced: onnx.ModelProto, folder: Path, targets: Sequence[str]) -> list[Graph]:
    """The text tower as it was traced, and with ONNX Runtime's own fused attention where that is faster there."""
    weights = WeightsFile(folder / TEXT_WEIGHTS)
    weights.save(traced, folder / TEXT_FILE)
    graphs = [describe_graph("text", folder / TEXT_FILE, weights=TEXT_WEIGHTS)]
    if _FUSING_TARGET in targets:
        fused = _fuse_attention(traced)
        if Stopwatch(Options(backend=_FUSING_TARGET)).compare(traced, fused, _PROMPTS).is_faster:
            path = folder / f"text.fp32.{_FUSING_TARGET}.onnx"
            weights.save(fused, path)
            graphs.append(describe_graph("text", path, target=_FUSING_TARGET, weights=TEXT_WEIGHTS))
    return graphs


def _fuse_attention(traced: onnx.ModelProto) -> onnx.ModelProto:
    """Attention, its projections, biases and norms as single operators of ONNX Runtime, by onnxscript's rules."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(ir.from_proto(traced))
    return ir.to_proto(model)
