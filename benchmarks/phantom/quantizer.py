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
        dead_below: codes used less often per batch (running mean) are put on tokens of the batch.
    """

    def __init__(self, codebook: Codebook, generator: torch.Generator, decay: float = 0.98,
                 dead_below: float = 0.02) -> None:
        self._codebook = codebook
        self._generator = generator
        self._decay = decay
        self._dead_below = dead_below

    @torch.no_grad()
    def start(self, tokens: Tensor) -> None:
        """Put every code on a token ``[n, C]`` picked at random."""
        book = self._codebook
        rows = F.normalize(tokens, dim=-1)[self._pick(len(tokens), book.embed.shape[1])]
        for name, value in (("embed", rows[None]), ("embed_avg", rows[None])):
            book.get_buffer(name).copy_(value)
        book.get_buffer("cluster_size").fill_(1.0)

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
        dead = (size[0] < self._dead_below).nonzero().flatten()
        if len(dead):
            average[0, dead] = unit[self._pick(len(unit), len(dead))]
            size[0, dead] = 1.0
        embed.copy_(F.normalize(average, dim=-1))

    def _pick(self, count: int, wanted: int) -> Tensor:
        return torch.randint(count, (wanted,), generator=self._generator)  # on the CPU: the same on every device
