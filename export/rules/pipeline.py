"""The rules in their order, and what each did."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from ...runtime.errors import InputError, suggestion
from ...runtime.provenance import Rewrite
from . import (
    compose_stem,
    flatten_convolutions,
    fold_layer_scale,
    fold_projection,
    merge_branches,
    mlp_to_convolutions,
    sink_transposes,
)
from .base import Rule
from .cost import cost_of
from .line_input import LineInput
from .measured import Stopwatch
from .stream_planes import PLANE, StreamPlanes

#: A rule set that still finds something after so many passes goes in circles.
_MOST_PASSES = 200


class Step(Protocol):
    """One rewrite of a graph. ``refused``: why it left places alone that its pattern fits, in the last ``apply``."""

    title: str
    refused: list[str]

    def apply(self, model: ir.Model) -> int:
        """Rewrite in place; returns the number of places."""
        ...


class PatternStep:
    """Rules applied together until none of them finds anything."""

    def __init__(self, title: str, rules: Sequence[type[Rule]]) -> None:
        self.title, self._rules = title, rules
        self.refused: list[str] = []

    def apply(self, model: ir.Model) -> int:
        """See Step."""
        instances = [rule() for rule in self._rules]
        rules = RewriteRuleSet([_as_rule(instance) for instance in instances])
        total = 0
        for _ in range(_MOST_PASSES):
            for instance in instances:
                instance.refused.clear()
            count = rules.apply_to_model(model)
            passes.RemoveUnusedNodesPass()(model)
            if not count:
                break
            total += count
        else:
            raise RuntimeError(f"{self.title} does not come to an end")
        self.refused = [reason for instance in instances for reason in instance.refused] if not total else []
        return total


def _as_rule(instance: Rule) -> Any:
    return RewriteRule(instance.pattern, instance.rewrite, instance.check, remove_nodes=instance.remove_nodes)


#: The order matters: an MLP between transposes hides a layer's scale, a transpose between layers hides the stem.
RULES: tuple[Callable[[], Step], ...] = (
    lambda: PatternStep("mlp_to_convolutions", mlp_to_convolutions.RULES),
    lambda: PatternStep("fold_layer_scale", fold_layer_scale.RULES),
    lambda: PatternStep("fold_projection", fold_projection.RULES),
    lambda: PatternStep("sink_transposes", sink_transposes.RULES),
    lambda: PatternStep("compose_stem", compose_stem.RULES),
    lambda: PatternStep("merge_branches", merge_branches.RULES),
    LineInput,
    StreamPlanes,
    lambda: PatternStep("flatten_convolutions", flatten_convolutions.RULES),
)
#: Rules that are exact everywhere and faster on some targets only.
MEASURED = ("stream_planes", "flatten_convolutions")
#: Key of a node's metadata.
RULE_TAG = "dcformer_deploy.rewrite"
#: Graphs of which not many copies should be alive at once.
_LARGE_BYTES = 256 << 20
RULE_NAMES = tuple(make().title for make in RULES)


def optimize(proto: onnx.ModelProto, without: Collection[str] = (),
             stopwatch: Stopwatch | None = None) -> tuple[onnx.ModelProto, list[Rewrite]]:
    """Apply the rules to a graph, except those named in ``without``.

    Args:
        stopwatch: keeps a rule of ``MEASURED`` only where it is faster; None keeps it in any case.

    Returns:
        The rewritten graph, with inferred shapes, and a report for each rule that was tried.

    Raises:
        InputError: ``without`` names a rule that does not exist.
    """
    require_rules(without)
    reports = []
    before, large = cost_of(proto), proto.ByteSize() > _LARGE_BYTES
    for make in RULES:
        step = make()
        if step.title in without:
            continue
        if large:  # the last rule's graph holds its weights in cycles of references
            model = None
            gc.collect()
        model = ir.from_proto(proto)
        there = set(model.graph)
        names = {value.name for node in there for value in node.outputs}
        matched = step.apply(model)
        if not matched:
            reports.append(Rewrite(step.title, 0, tuple(step.refused), before, before))
            continue
        _stamp(model, there, names, step.title)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        found = _with_shapes(ir.to_proto(model))
        timing = stopwatch.compare(proto, found) if stopwatch and step.title in MEASURED else None
        if timing is not None and not timing.is_faster:
            reason = f"graph: slower, {timing.after_ms:.0f} instead of {timing.before_ms:.0f} ms"
            reports.append(Rewrite(step.title, 0, (reason,), before, before, timing))
            continue
        proto, after = found, cost_of(found)
        reports.append(Rewrite(step.title, matched, tuple(step.refused), before, after, timing))
        before = after
    return proto, reports


def _stamp(model: ir.Model, there: Collection[ir.Node], names: Collection[str | None], title: str) -> None:
    """Say on each new node which rewrite made it, and give new values names that no other value ever has.

    onnxscript tags nodes too, but appends to what it finds: megabytes after some rewrites of rewritten nodes. Values
    that are new get the next number that is free, which may have been that of a value that is gone: whoever knows
    something of that one, such as its range, would take it for this one.
    """
    count = 0
    for node in model.graph:
        if node in there:
            continue
        node.metadata_props.clear()
        node.metadata_props[RULE_TAG] = title
        for value in node.outputs:
            if value.name not in names and PLANE not in str(value.name) and not value.is_graph_output():
                value.name = f"{title}/{count}"
                count += 1


def require_rules(names: Collection[str]) -> None:
    """Refuse names that are no rule's.

    Raises:
        InputError: the message names the nearest one.
    """
    for name in names:
        if name not in RULE_NAMES:
            raise InputError(f"rewrite rule {name!r}: unknown{suggestion(name, RULE_NAMES)}; the rules are "
                             f"{', '.join(RULE_NAMES)}")


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
