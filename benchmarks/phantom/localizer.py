"""A second teacher for training: where each finding lies, which phantoms know and reports do not say."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.manifest import CT_RATE_CLASSES

#: Painted with the anatomy, so there is no place that it alone changed.
_UNPLACED = CT_RATE_CLASSES.index("Cardiomegaly")


class Localizer(nn.Module):
    """Reads the findings from each position of some stages, linearly; dropped after training.

    A scan's labels are 18 bits for 131,000 positions, and small findings drown in the mean over all tokens. Deep
    supervision (Lee et al., arXiv:1409.5185) with the findings' places teaches the stages to see them.

    Args:
        channels: of the stages it reads.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm3d(count) for count in channels)
        self.readers = nn.ModuleList(nn.Conv3d(count, len(CT_RATE_CLASSES), 1) for count in channels)

    def forward(self, stages: Sequence[Tensor], places: Tensor) -> Tensor:
        """Mean binary cross entropy over positions and findings.

        Args:
            stages: ``[B, C, H', W', D']`` each.
            places: ``[B, 18, H/8, W/8, D/8]``, 1 where a finding is.
        """
        total = places.new_zeros(())
        for norm, reader, features in zip(self.norms, self.readers, stages, strict=True):
            logits = reader(norm(features.float()))
            error = F.binary_cross_entropy_with_logits(logits, pool_places(places, tuple(features.shape[2:])),
                                                       reduction="none")
            total = total + (error.sum(dim=1) - error[:, _UNPLACED]).mean() / (error.shape[1] - 1)
        return total / len(self.readers)


def pool_places(places: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Whether a finding lies in each of a stage's positions ``[B, 18, *grid]``.

    A position's middle is the voxel that its stride looks at, as in ``places``, so its cell begins half a cell before.
    """
    window = places.shape[-1] // grid[-1]
    if window == 1:
        return places
    padded = F.pad(places, (window // 2, 0) * 3)
    return F.max_pool3d(padded, window)[..., : grid[0], : grid[1], : grid[2]]
