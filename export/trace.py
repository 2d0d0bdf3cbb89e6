"""PyTorch to ONNX: the image tower and the text tower, with named axes."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import onnx
import torch
from torch import Tensor, nn

from ..runtime.errors import InputError
from .clip import Clip, ClipSpec, Detector

#: Newest opset that TensorRT 10, OpenVINO and ONNX Runtime all read, and the first with Gelu as one operator.
OPSET = 20
BATCH_AXIS = "batch"
SEQUENCE_AXIS = "sequence"


class _ImageTower(nn.Module):
    """``volume`` [B, 1, D, H, W] to the outputs of ``ImageOutputs``, plus class scores for a detector."""

    def __init__(self, model: Clip | Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, volume: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.model, Detector):
            outputs = self.model.trained_model.encode_image(volume)
            scores = self.model.class_scores(outputs.embedding)
        else:
            outputs, scores = self.model.encode_image(volume), None
        return tuple(tensor for tensor in (*outputs, scores) if tensor is not None)


class _TextTower(nn.Module):
    """``input_ids``, ``attention_mask`` [B, L] to unit rows [B, 512]."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.clip.encode_text(input_ids, attention_mask)


#: How PyTorch's messages name a line of a module.
_PLACE = re.compile(r"File \"([^\"]+)\", line (\d+), in forward")


def trace_image_tower(model: Clip | Detector, spec: ClipSpec) -> onnx.ModelProto:
    """The image tower; batch is dynamic, the volume's sides are those of the spec."""
    side = spec.input_size
    # Two volumes, because a traced axis of length 1 would be taken for a constant. Zeros cost no memory until written.
    example = (torch.zeros(2, 1, side // 2, side, side),)
    outputs = ["image_embedding", *["codes"] * (spec.codebook_size is not None), "feature_map",
               *["class_scores"] * isinstance(model, Detector)]
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    return _trace(_ImageTower(model), example, ["volume"], outputs, {"volume": {0: batch}})


def trace_text_tower(clip: Clip, spec: ClipSpec) -> onnx.ModelProto:
    """The text tower; batch and length are dynamic."""
    # Two tensors, not one twice: the tracer takes the same object for the same input and drops one.
    example = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    axes = {0: torch.export.Dim(BATCH_AXIS, min=1),
            1: torch.export.Dim(SEQUENCE_AXIS, min=1, max=spec.text.max_positions)}
    names = ["input_ids", "attention_mask"]
    return _trace(_TextTower(clip), example, names, ["text_embedding"], dict.fromkeys(names, axes))


def _trace(module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str],
           dynamic_shapes: dict[str, dict[int, torch.export.Dim]]) -> onnx.ModelProto:
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module.eval(), example, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs,
                dynamic_shapes=dynamic_shapes, optimize=True, verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            tower = outputs[0].split("_")[0]
            raise InputError(f"the {tower} tower cannot be traced: {_reason(error)}. Its forward must not branch on "
                             "values (docs/encoders.md)") from error
        assert program is not None
        proto = program.model_proto
    _drop_metadata(proto)
    return proto


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause; the exporter wraps it in pages of advice."""
    told = ""
    while True:
        told += f"{error}\n"
        if error.__cause__ is None:
            break
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = _PLACE.findall(told)
    where = f" at {place[-1][0]}, line {place[-1][1]}" if place else ""
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".") + where


def _drop_metadata(proto: onnx.ModelProto) -> None:
    """Remove stack traces with this machine's paths: the same checkpoint must give the same file everywhere."""
    for items in (proto.graph.node, proto.graph.value_info, proto.graph.input, proto.graph.output,
                  proto.graph.initializer):
        for item in items:
            item.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs about torchvision, which no model here uses, and warns about torch's own internals.

    A graph that it gives up on it prints on standard error, pages of it; our line says where it gave up.
    """
    loggers = {name: logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.fx", "torch.export",
                                                          "torch._dynamo", "torch.fx.experimental.symbolic_shapes")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
