"""What every rewrite rule shares: refusing with a reason, reading constants, naming new ones."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase


class Refused(Exception):
    """A rule's pattern is there, but the rule would not be exact or of use; the message says why."""


class Rule(RewriteRuleClassBase, ABC):
    """A rewrite rule of onnxscript whose ``require`` raises Refused instead of returning a match result.

    ``title``: its name for users, as in the file's name. ``refused``: reasons since the last ``begin``.
    """

    title: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.title)
        self.refused: list[str] = []
        self._named = 0

    def begin(self) -> None:
        """Forget the refusals of the last graph."""
        self.refused.clear()
        self._named = 0

    def require(self, **bound: ir.Value) -> None:
        """Raise Refused where the rewrite must not happen; ``bound``: the pattern's values by name."""

    def check(self, context: Any, **bound: ir.Value) -> MatchResult:
        """See onnxscript."""
        del context
        result = MatchResult()
        try:
            self.require(**bound)
        except Refused as reason:
            where = next((value.name for value in reversed(bound.values()) if value is not None), "")
            text = f"{where}: {reason}"
            if text not in self.refused:
                self.refused.append(text)
            return result.fail(str(reason))
        return result

    def constant(self, op: Any, array: NDArray[Any], like: str) -> ir.Value:
        """A new initializer, named after the rule and what it stands for."""
        self._named += 1
        return op.initializer(ir.tensor(np.ascontiguousarray(array)), name=f"{like}/{self.title}.{self._named}")


def array_of(value: ir.Value | None, what: str) -> NDArray[Any]:
    """The constant that a value holds.

    Raises:
        Refused: it is computed, an input, or absent.
    """
    if value is None or value.const_value is None or value.is_graph_input():
        raise Refused(f"{what} is not a constant")
    return value.const_value.numpy()


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    """Sides of a value; a dynamic one is a string.

    Raises:
        Refused: unknown.
    """
    if value.shape is None:
        raise Refused(f"the shape of {value.name} is unknown")
    return tuple(side if isinstance(side, int) else str(side) for side in value.shape)


def sides_of(value: ir.Value) -> tuple[int, int, int]:
    """Spatial sides (D, H, W) of a volume ``[B, C, D, H, W]``.

    Raises:
        Refused: not a volume, or its sides are not fixed.
    """
    sides = shape_of(value)[2:]
    if len(sides) != 3 or not all(isinstance(side, int) for side in sides):
        raise Refused(f"the sides of {value.name} are not fixed")
    return int(sides[0]), int(sides[1]), int(sides[2])
