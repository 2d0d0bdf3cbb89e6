"""The proof that an exported graph computes what the PyTorch model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.backends import Options, open_graph
from ..runtime.errors import CheckFailed
from ..runtime.provenance import Agreement
from ..runtime.volume import image_feeds
from .clip import Clip, Detector, ImageOutputs
from .graph_files import describe_graph

#: fp32 graphs differ from PyTorch by summation order only. `make demo` shows 1e-6, so this is a wide margin.
TOLERANCE = 1e-4
#: Some models amplify rounding: the softmax of TransUNet's large scores is nearly an argmax, and leaves single tokens
#: of PyTorch's own fp32 result 5e-2 from fp64 (tiny, 512x512x256, random weights), while all of it has a cosine of
#: 0.99999. Beyond TOLERANCE, a graph may differ from PyTorch by so many times PyTorch's own error, up to the limit, but
#: no cosine may fall below the smallest.
OWN_ERRORS, LARGEST_TOLERANCE, SMALLEST_COSINE = 4.0, 0.1, 0.9999
LARGEST_TIED_SHARE = 0.01
_NUDGES, _SEED = 3, 0
#: Two codes whose cosine similarities differ by less than this share of the tolerance are a tie that rounding may
#: decide either way; beyond TOLERANCE, those that differ by less than OWN_ERRORS times PyTorch's own error.
NEAR_TIE_SHARE = 0.1


def compare(reference: NDArray[np.floating], found: NDArray[np.floating]) -> tuple[float, float]:
    """Largest relative error and smallest cosine of ``[B, …]`` arrays; NaN or differing shapes count as infinite error.

    Relative error: largest absolute difference over the largest absolute reference value.
    """
    if reference.shape != found.shape or not reference.size or not np.isfinite(found).all():
        return float("inf"), -1.0
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (reference, found))
    error = np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(error), float(((a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)).min())


def check_image_tower(
    model: Clip | Detector, paths: Sequence[Path], volumes: Mapping[str, NDArray[np.float32]]
) -> list[Agreement]:
    """Compare graphs with PyTorch on volumes ``[B, D, H, W]`` by name of input.

    The argmax of the quantizer is judged apart: feature maps must agree, codes must agree except where PyTorch itself
    sees a tie, and the embedding is compared with what PyTorch makes of the graph's own codes. Without a quantizer,
    feature map and embedding are compared. The tolerance is ``TOLERANCE``, or what ``OWN_ERRORS`` says.

    Raises:
        CheckFailed: a code differs without a tie.
    """
    clip = model.trained_model if isinstance(model, Detector) else model
    result = []
    for label, volume in volumes.items():
        with torch.no_grad():
            expected = clip.encode_image(torch.from_numpy(volume[:, None]))
            for path in paths:
                result += _check_volume(model, path, label, volume, expected)
    return sorted(result, key=lambda agreement: [path.name for path in paths].index(agreement.graph))


def _check_volume(model: Clip | Detector, path: Path, label: str, volume: NDArray[np.float32],
                  expected: ImageOutputs) -> list[Agreement]:
    clip = model.trained_model if isinstance(model, Detector) else model
    names = ["feature_map", "image_embedding", *["codes"] * (clip.visual_transformer.vq is not None),
             *["class_scores"] * isinstance(model, Detector)]
    feeds = image_feeds(describe_graph("image", path).inputs, volume)
    found = dict(zip(names, open_graph(path, Options()).run(feeds, names), strict=True))
    tolerance, near_tie = _tolerances(clip, volume, expected.feature_map, found["feature_map"])
    embedding, codes_equal = expected.embedding, None
    if expected.codes is not None:
        codes = torch.from_numpy(found["codes"])
        codes_equal = _compare_codes(clip, expected.feature_map, expected.codes, codes, near_tie,
                                     f"{path.name}, {label}")
        height, width, depth = expected.feature_map.shape[2:]
        embedding = clip.embed_codes(codes, (depth, height, width))
    reference = {"feature_map": expected.feature_map, "image_embedding": embedding}
    if isinstance(model, Detector):
        reference["class_scores"] = model.class_scores(embedding)
    result = []
    for output, tensor in reference.items():
        error, cosine = compare(tensor.numpy(), found[output])
        share = None if output == "feature_map" else codes_equal
        result.append(Agreement(path.name, output, label, error, cosine, tolerance, share))
    return result


def _tolerances(clip: Clip, volume: NDArray[np.float32], expected: torch.Tensor,
                found: NDArray[np.float32]) -> tuple[float, float]:
    """Of the feature map (see ``OWN_ERRORS``), and of the similarities with codes, in PyTorch's own errors likewise.

    fp64, which takes twice the memory, runs only where the usual tolerance is missed. One result alone says little of
    how far rounding carries a model (for TransUNet it varies fivefold from volume to volume), so PyTorch's own error is
    the largest of several, the others with the input moved by one unit in the last place of float32, up or down at
    random.
    """
    if compare(expected.numpy(), found)[0] <= TOLERANCE:
        return TOLERANCE, NEAR_TIE_SHARE * TOLERANCE
    exact = copy.deepcopy(clip.visual_transformer.encoder).double()(torch.from_numpy(volume[:, None]).double())
    results = [expected, *_nudged(clip.visual_transformer.encoder, volume)]
    own = max(compare(exact.numpy(), result.double().numpy())[0] for result in results)
    near_tie = NEAR_TIE_SHARE * TOLERANCE
    if clip.visual_transformer.vq is not None:
        truth = _similarities(clip, exact.float())
        own_similarity = max(float((_similarities(clip, result) - truth).abs().max()) for result in results)
        near_tie = max(near_tie, min(OWN_ERRORS * own_similarity, LARGEST_TOLERANCE))
    return min(max(TOLERANCE, OWN_ERRORS * own), LARGEST_TOLERANCE), near_tie


def _nudged(encoder: torch.nn.Module, volume: NDArray[np.float32]) -> Iterator[torch.Tensor]:
    """What the encoder makes of a volume ``[B, D, H, W]`` that is moved by rounding."""
    rng = np.random.default_rng(_SEED)
    for _ in range(_NUDGES):
        direction = rng.choice(np.array([-np.inf, np.inf], np.float32), volume.shape)
        yield encoder(torch.from_numpy(np.nextafter(volume, direction)[:, None]))


def _similarities(clip: Clip, feature_map: torch.Tensor) -> torch.Tensor:
    """Of every token with every code, ``[B, D'H'W', codes]``."""
    return clip.codebook.similarities(feature_map.permute(0, 4, 2, 3, 1).flatten(1, 3))


def _compare_codes(clip: Clip, feature_map: torch.Tensor, expected: torch.Tensor, found: torch.Tensor,
                   near_tie: float, where: str) -> float:
    """Share of equal codes; every other one must be a tie in PyTorch's own similarities."""
    differs = expected != found
    if differs.any():
        similarity = _similarities(clip, feature_map)
        gap = (similarity.gather(2, expected[..., None]) - similarity.gather(2, found[..., None]))[..., 0][differs]
        if not gap.max() <= near_tie or differs.sum() > max(1, LARGEST_TIED_SHARE * differs.numel()):
            raise CheckFailed(f"{where}: {int(differs.sum())} of {differs.numel()} VQ codes differ from PyTorch, by up "
                              f"to {gap.max():.2g} in similarity where {near_tie:g} would be rounding")
    return float(1 - differs.double().mean())


def check_text_tower(
    clip: Clip, path: Path, texts: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> list[Agreement]:
    """Compare the graph with PyTorch on (ids, mask) pairs ``[B, L]`` by name of input."""
    backend = open_graph(path, Options())
    result = []
    for label, (ids, mask) in texts.items():
        (found,) = backend.run({"input_ids": ids, "attention_mask": mask}, ["text_embedding"])
        with torch.no_grad():
            expected = clip.encode_text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        result.append(Agreement(path.name, "text_embedding", label, *compare(expected, found), TOLERANCE))
    return result


def require_agreement(agreements: Iterable[Agreement]) -> None:
    """Raise CheckFailed if any error is above its tolerance, or if nothing was compared."""
    agreements = list(agreements)
    if not agreements:
        raise CheckFailed("nothing was compared with PyTorch")
    failed = [item for item in agreements if not item.max_relative_error <= item.tolerance
              or not item.cosine >= SMALLEST_COSINE]
    if failed:
        each = (f"{item.output} on {item.input} input by {item.max_relative_error:.2e} (cosine {item.cosine:.6f})"
                for item in failed)
        raise CheckFailed(f"{failed[0].graph}: differs from PyTorch: {', '.join(each)}; the tolerance is "
                          f"{failed[0].tolerance:.0e} relative; nothing was written")
