"""A second teacher for training: where each finding lies, which phantoms know and reports do not say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.manifest import CT_RATE_CLASSES
from .losses import focused_mean

#: Painted with the anatomy, so there is no place that it alone changed.
_UNPLACED = CT_RATE_CLASSES.index("Cardiomegaly")

#: Of positions that a finding touches, where a few scans do not tell.
_LOWEST_RATE = 1e-4


class Localizer(nn.Module):
    """Reads the findings from each position of the stages, linearly; dropped after training.

    A scan's labels are 18 bits for 131,000 positions, and small findings drown in the mean over all tokens. Deep
    supervision (Lee et al., arXiv:1409.5185) with the findings' places teaches the stages to see them.

    Args:
        channels: of the stages.
        places: of some scans ``[n, 18, H/8, W/8, D/8]``; the first stage has a position for each.
    """

    def __init__(self, channels: Sequence[int], places: Tensor) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm3d(count) for count in channels)
        self.readers = nn.ModuleList(nn.Conv3d(count, len(CT_RATE_CLASSES), 1) for count in channels)
        entropies = []
        for index, reader in enumerate(self.readers):
            grid = tuple(side >> index for side in places.shape[2:])
            rate = pool_places(places, grid).mean(dim=(0, 2, 3, 4)).clamp(_LOWEST_RATE, 1 - _LOWEST_RATE)
            nn.init.zeros_(reader.get_parameter("weight"))
            reader.get_parameter("bias").data.copy_(torch.logit(rate))
            entropies.append(-(rate * rate.log() + (1 - rate) * (1 - rate).log()))
        self.register_buffer("entropy", torch.stack(entropies))
        self.entropy: Tensor

    def forward(self, stages: Sequence[Tensor], places: Tensor, focus: bool = False) -> Tensor:
        """Sum over the stages of the mean over findings of the cross entropy, as a share of what it begins with.

        Without the share, a finding that fills the lungs would weigh a hundred times as much as a nodule.

        Args:
            stages: ``[B, C, H', W', D']`` each.
            places: ``[B, 18, H/8, W/8, D/8]``, 1 where a finding is.
            focus: see ``focused_mean``.
        """
        total = places.new_zeros(())
        for norm, reader, features, entropy in zip(self.norms, self.readers, stages, self.entropy, strict=True):
            truth = pool_places(places, tuple(features.shape[2:]))
            error = F.binary_cross_entropy_with_logits(reader(norm(features.float())), truth, reduction="none")
            shares = error.mean(dim=(0, 2, 3, 4)) / entropy
            total = total + focused_mean(torch.cat([shares[:_UNPLACED], shares[_UNPLACED + 1 :]]), focus)
        return total


def pool_places(places: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Whether a finding lies in each of a stage's positions ``[B, 18, *grid]``.

    A position's middle is the voxel that its stride looks at, as in ``places``, so its cell begins half a cell before.
    """
    window = places.shape[-1] // grid[-1]
    if window == 1:
        return places
    padded = F.pad(places, (window // 2, 0) * 3)
    return F.max_pool3d(padded, window)[..., : grid[0], : grid[1], : grid[2]]
