"""Learning the codebook: nearest code by cosine, codes as running means of what they stand for.

The rules of van den Oord et al. (arXiv:1711.00937, appendix A.1) in the cosine form of Yu et al. (arXiv:2110.04627),
which the published models train with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...export.clip import Codebook


@dataclass(frozen=True)
class Quantized:
    """What the projection reads.

    ``tokens`` [B, N, C]: unit codes whose gradient goes to what was quantized; ``commitment``: mean of 1 - cosine
    between the two; ``codes`` [B, N] int64.
    """

    tokens: Tensor
    commitment: Tensor
    codes: Tensor


class CodebookTrainer:
    """Quantizes tokens and moves the codebook's buffers after them.

    Args:
        decay: share of the old in each running mean.
        dead_below: codes used less often (running mean, as a share of the average code's use) are put on tokens of the
            batch.
    """

    def __init__(self, codebook: Codebook, generator: torch.Generator, decay: float = 0.99,
                 dead_below: float = 0.02) -> None:
        self._codebook = codebook
        self._generator = generator
        self._decay = decay
        self._dead_below = dead_below

    @torch.no_grad()
    def start(self, tokens: Tensor, batches: float = 1) -> None:
        """Fit the codes to the tokens ``[n, C]`` of some batches, beginning with some of them at random."""
        embed = self._codebook.get_buffer("embed")
        embed[0] = F.normalize(tokens, dim=-1)[self._pick(len(tokens), embed.shape[1])]
        self.fit(tokens, batches)

    @torch.no_grad()
    def fit(self, tokens: Tensor, batches: float = 1, iterations: int = 10) -> None:
        """Fit the codes to the tokens ``[n, C]`` of some batches by spherical k-means (Dhillon and Modha, 2001)."""
        embed, average, size = (self._codebook.get_buffer(name) for name in ("embed", "embed_avg", "cluster_size"))
        unit = F.normalize(tokens, dim=-1)
        for _ in range(iterations):
            codes = torch.cat([self._codebook(part) for part in unit.split(8192)])
            counts = torch.bincount(codes, minlength=embed.shape[1]).to(unit.dtype)
            sums = torch.zeros_like(embed[0]).index_add_(0, codes, unit)
            empty = (counts == 0).nonzero().flatten()
            sums[empty], counts[empty] = unit[self._pick(len(unit), len(empty))], 1.0
            embed[0] = F.normalize(sums, dim=-1)
            average[0], size[0] = sums / batches, counts / batches

    def __call__(self, tokens: Tensor) -> Quantized:
        """Quantize tokens ``[B, N, C]`` float32 and update the codebook."""
        unit = F.normalize(tokens, dim=-1)
        codes = self._codebook(unit.detach())
        rows = F.embedding(codes, self._codebook.embed[0])
        commitment = (1 - (unit * rows).sum(dim=-1)).mean()
        self._follow(unit.detach().flatten(0, 1), codes.flatten())
        return Quantized(unit + (rows - unit).detach(), commitment, codes)

    @torch.no_grad()
    def _follow(self, unit: Tensor, codes: Tensor) -> None:
        embed, average, size = (self._codebook.get_buffer(name) for name in ("embed", "embed_avg", "cluster_size"))
        counts = torch.bincount(codes, minlength=embed.shape[1]).to(unit.dtype)
        sums = torch.zeros_like(embed[0]).index_add_(0, codes, unit)
        size.lerp_(counts[None], 1 - self._decay)
        average.lerp_(sums[None], 1 - self._decay)
        fair = len(unit) / embed.shape[1]
        dead = (size[0] < self._dead_below * fair).nonzero().flatten()
        if len(dead):
            average[0, dead] = unit[self._pick(len(unit), len(dead))] * fair
            size[0, dead] = fair
        embed.copy_(F.normalize(average, dim=-1))

    def _pick(self, count: int, wanted: int) -> Tensor:
        return torch.randint(count, (wanted,), generator=self._generator)  # on the CPU: the same on every device
