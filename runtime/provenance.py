"""What a manifest tells of how its graphs were made: rewrites, conversions, and how near they are to PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

#: A graph that is good anywhere; other targets are names of back ends.
ANY_TARGET = "any"
#: Share of all cores that other programs may use while something is measured.
MOST_OF_OTHERS = 0.1


@dataclass(frozen=True)
class GraphCost:
    """What a graph costs for a batch of one: nodes, multiply-accumulates, bytes that its nodes read and write."""

    nodes: int
    multiply_adds: int
    bytes_moved: int


@dataclass(frozen=True)
class Timing:
    """Best latencies of the image tower, batch 1, without and with a rewrite, and where they were measured.

    ``others``: share of the machine's cores that other programs used meanwhile.
    """

    before_ms: float
    after_ms: float
    where: str
    others: float = 0.0

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs used so much that another measurement may decide otherwise."""
        return self.others > MOST_OF_OTHERS

    @property
    def is_faster(self) -> bool:
        """Whether the rewrite pays."""
        return self.after_ms < self.before_ms


@dataclass(frozen=True)
class Rewrite:
    """What one exact rewrite rule did to the image tower when the bundle was made.

    ``matched``: places that it changed. ``refused``: places that its pattern fits and it left alone, with the reason.
    ``measured``: for a rule that is kept only where it is faster, what was found. ``target``: of the graph.
    """

    rule: str
    matched: int
    refused: tuple[str, ...]
    before: GraphCost
    after: GraphCost
    measured: Timing | None = None
    target: str = ANY_TARGET


@dataclass(frozen=True)
class Conversion:
    """How the graphs of a lower precision were made.

    ``method``: of INT8's thresholds. ``scans``, ``data``: number of calibration scans and digest of their contents.
    ``layers``: of the image tower, in INT8. ``notes``: what stayed in a higher precision, and why.
    """

    precision: str
    method: str | None
    scans: int
    data: str
    layers: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """How far one graph was from PyTorch (fp32, CPU) on one input when the bundle was made.

    ``max_relative_error``: largest absolute difference divided by the largest absolute value of PyTorch's output.
    ``cosine``: the smallest cosine similarity of a sample. ``codes_equal``: share of VQ codes that agree, where the
    output depends on them; an image embedding is compared given the graph's own codes.
    """

    graph: str
    output: str
    input: str
    max_relative_error: float
    cosine: float
    tolerance: float
    codes_equal: float | None = None
