"""The losses of the training: scans against reports, and scans against the zero-shot prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...export.make_bundle import SIMILARITY_SCALE

#: At e the 18 statements could not all be near certain in one unit vector; ranks and the threshold 0.5 stay the same.
STATEMENT_SCALE = 8.0


def report_loss(images: Tensor, reports: Tensor) -> Tensor:
    """The original's loss: cross entropy of scans against reports and of reports against scans, ``[B, 512]`` each."""
    logits = SIMILARITY_SCALE * images @ reports.t()
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def focused_mean(losses: Tensor, focus: bool = True) -> Tensor:
    """Mean over findings ``[n]``; with ``focus`` each weighs in proportion to its loss, so that hard ones count more.

    Dynamic task prioritization (Guo et al., ECCV 2018); the weights have a mean of 1 and no gradient.
    """
    if not focus:
        return losses.mean()
    weights = losses.detach() / losses.detach().mean().clamp(min=torch.finfo(losses.dtype).tiny)
    return (weights * losses).mean()


def statement_loss(images: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
    """By finding ``[18]``: each scan ``[B, 512]`` against its two prompts ``[18, 2, 512]``, each prompt against scans.

    A prompt is true of several scans of a batch; it is to be equally near to all of them.
    """
    logits = STATEMENT_SCALE * torch.einsum("bd,fpd->bfp", images, prompts)
    is_true = torch.stack([labels, 1 - labels], dim=-1)
    scan_to_prompt = -(logits.log_softmax(dim=-1) * is_true).sum(dim=-1).mean(dim=0)
    per_prompt = -(logits.log_softmax(dim=0) * is_true).sum(dim=0) / is_true.sum(dim=0).clamp(min=1)
    chance = is_true.sum(dim=0).clamp(min=1).log()  # what is left when all true scans are equally near
    prompt_to_scan = (per_prompt - chance).mean(dim=-1)
    return (scan_to_prompt + prompt_to_scan) / 2
