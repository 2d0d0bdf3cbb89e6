"""CLIP pretraining on phantoms: model, loss, schedule and state. ``train`` is the command."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ...export.clip import Clip, ClipSpec, reduce_tokens
from ...export.encoders.dcformer import DCFormer
from ...export.registry import get_encoder
from ...export.text import TextSpec
from ...runtime.errors import InputError
from ...runtime.files import atomic_file
from ...runtime.manifest import CT_RATE_CLASSES, Preprocessing
from .batches import MAX_TOKENS, Batch, Batches, Texts, TrainOptions
from .captions import statements
from .localizer import Localizer
from .losses import focused_mean, report_loss, statement_loss
from .quantizer import CodebookTrainer
from .samples import BYTE_SCALE, VARIANTS, Sample
from .stem import Centre, calibrate_stem, late_parameters, run_stages, run_stem, stage_channels

ENCODER, REDUCTION = "dcformer-nano", "channel"
#: A field of view of 384 x 384 x 288 mm: the published 0.75 and 1.5 mm would show a quarter of the chest at this size.
PREPROCESSING = Preprocessing(shape_dhw=(128, 256, 256), spacing_hwd_mm=(1.5, 1.5, 2.25))
INPUT_SIZE = PREPROCESSING.shape_dhw[1]
CODEBOOK_SIZE = 4096
STATEMENT_WEIGHT, HEAD_WEIGHT, PLACE_WEIGHT, COMMITMENT_WEIGHT = 3.0, 4.0, 2.0, 0.25
#: Learning rates of the text tower, and of the stem's layers that open late, as shares of the image tower's.
TEXT_SHARE, LATE_SHARE = 0.5, 5.0
CHECKPOINT_NAME, STATE_NAME = "checkpoint.pth", "training_state.pt"


class Trainer:
    """One training run in a folder."""

    def __init__(self, out: Path, samples: Sequence[Sample], monitored: Sequence[Sample], options: TrainOptions,
                 device: str) -> None:
        torch.manual_seed(options.seed)
        self.out, self.options, self.device = out, options, torch.device(device)
        self.texts = Texts(out / "tokenizer" / "vocab.txt")
        self.batches = Batches(samples, self.texts, options)
        self.monitored = monitored
        text = TextSpec(self.texts.size, hidden_size=128, layers=2, intermediate_size=512, max_positions=MAX_TOKENS,
                        token_types=2)
        spec = ClipSpec(get_encoder(ENCODER), REDUCTION, INPUT_SIZE, CODEBOOK_SIZE, text)
        model = spec.build()
        assert isinstance(model, Clip)  # the spec has no detector classes
        self.model = model.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        encoder = model.visual_transformer.encoder
        assert isinstance(encoder, DCFormer)
        self.encoder, self.book = encoder, model.codebook
        self.codebook = CodebookTrainer(self.book, self.generator)
        self.centre = Centre(spec.encoder.channels).to(self.device)
        # Only for training: labels read linearly from what the projection reads, normalised over the batch. The
        # contrastive losses alone teach the image tower far more slowly.
        width = spec.reduced_width
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, len(CT_RATE_CLASSES))).to(self.device)
        some = torch.from_numpy(np.stack([sample.places for sample in samples[::8]]).astype(np.float32))
        self.localizer = Localizer(stage_channels(encoder), some).to(self.device)
        extra = [*self.head.parameters(), *self.localizer.parameters()]
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, extra), betas=(0.9, 0.98))
        self.step = 0
        self.amp = _mixed_precision(self.device)
        self.prompt_ids = tuple(t.to(self.device) for t in self.texts.encode(statements()))

    @property
    def initted(self) -> Tensor:
        """Whether the codebook has begun (``[1]``, saved with the model as the original does)."""
        return self.book.get_buffer("initted")

    # ------------------------------------------------------------------ forward

    def stages(self, taps: Tensor) -> list[Tensor]:
        """What the encoder's stages compute."""
        scaled = taps.to(self.device).to(torch.bfloat16 if self.amp else torch.float32) / BYTE_SCALE - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return run_stages(self.encoder, run_stem(self.encoder, scaled, first_only=not self.stem_is_open))

    @property
    def stem_is_open(self) -> bool:
        """Whether the layers of the stem after the first are trained already."""
        return self.step >= self.options.open_stem_after * self.options.steps

    def tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens ``[B, D'H'W', C]`` float32 of the last stage, and their grid (D', H', W')."""
        tokens = self.centre(features.float()).permute(0, 4, 2, 3, 1)
        return tokens.flatten(1, 3), tuple(tokens.shape[1:4])

    def reduce(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What the projection reads ``[B, n]`` of quantized tokens ``[B, D'H'W', C]``."""
        return reduce_tokens(tokens.unflatten(1, grid), self.model.reduction)

    def project(self, reduced: Tensor) -> Tensor:
        """Unit embeddings ``[B, 512]``."""
        return F.normalize(self.model.to_visual_latent(reduced), dim=-1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss by name; their sum is minimised."""
        quantizes, focus = (self.step >= share * self.options.steps
                            for share in (self.options.quantize_after, self.options.focus_after))
        stages = self.stages(batch.taps)
        tokens, grid = self.tokens(stages[-1])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            reports = self.model.encode_text(batch.ids.to(self.device), batch.mask.to(self.device))
            prompts = self.model.encode_text(*self.prompt_ids)
        terms: dict[str, Tensor] = {}
        if quantizes:
            if not self.initted.item():
                self._start_codebook(range(self.step, self.step + self.options.codebook_batches))
            quantized = self.codebook(tokens)
            unit = quantized.tokens
            terms["commitment"] = COMMITMENT_WEIGHT * quantized.commitment
        else:
            unit = F.normalize(tokens, dim=-1)
        labels = batch.labels.to(self.device)
        reduced = self.reduce(unit, grid)
        images = self.project(reduced)
        terms["report"] = report_loss(images, reports.float())
        head = F.binary_cross_entropy_with_logits(self.head(reduced), labels, reduction="none").mean(dim=0)
        terms["head"] = HEAD_WEIGHT * focused_mean(head, focus)
        terms["place"] = PLACE_WEIGHT * self.localizer(stages, batch.places.to(self.device), focus)
        statement = statement_loss(images, prompts.float().unflatten(0, (-1, 2)), labels)
        terms["statement"] = STATEMENT_WEIGHT * focused_mean(statement, focus)
        return terms

    @torch.no_grad()
    def _start_codebook(self, numbers: Sequence[int]) -> None:
        """Fit the codes to the tokens of some batches as evaluation sees them."""
        was_training = self.model.training
        for module in (self.model, self.centre):
            module.eval()
        tokens = [self.tokens(self.stages(self.batches(number).taps)[-1])[0].flatten(0, 1) for number in numbers]
        for module in (self.model, self.centre):
            module.train(was_training)
        self.codebook.start(torch.cat(tokens), len(tokens))
        self.initted.fill_(1)

    # ------------------------------------------------------------------ the run

    @torch.no_grad()
    def start(self) -> None:
        """Fit the random weights to the data: statistics of the stem's norms, and no part common to all embeddings.

        What all scans (or all texts) share is projected out of the latent layers: it would make all embeddings alike.
        """
        self.initted.fill_(0)
        batches = [self.batches(number) for number in range(4)]
        calibrate_stem(self.encoder, batches[0].taps[:8].to(self.device).float() / BYTE_SCALE - 1)
        self.model.train()
        self.centre.train()
        tokens, grid = self.tokens(self.stages(batches[0].taps)[-1])
        _project_out(self.model.to_visual_latent, self.reduce(F.normalize(tokens, dim=-1), grid).mean(dim=0))
        self.model.eval()
        hidden = [self.model.text_transformer(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
                  .last_hidden_state[:, 0] for ids, mask in (self.prompt_ids, *((b.ids, b.mask) for b in batches))]
        _project_out(self.model.to_text_latent, torch.cat(hidden).mean(dim=0))

    def run(self, on_step: Callable[[int, dict[str, float]], None], save_every_s: float = 300) -> None:
        """Train to the last step; the state is saved every few minutes and at the end."""
        if self.step == 0:
            self.start()
        saved = time.monotonic()
        for _, batch in self.batches.stream(self.step, self.options.steps):
            for module in (self.model, self.centre, self.head, self.localizer):
                module.train()
            for group in self.optimizer.param_groups:
                group["lr"] = group["share"] * self._learning_rate()
            terms = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            sum(terms.values(), torch.zeros((), device=self.device)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            on_step(self.step, {name: float(term.detach()) for name, term in terms.items()})
            if time.monotonic() - saved > save_every_s:
                self.save_state()
                saved = time.monotonic()
        self.save_state()

    def tune(self, on_step: Callable[[int, dict[str, float]], None]) -> None:
        """Train projection and text tower alone, with the same losses, on the quantized tokens of all samples.

        Locked-image tuning (Zhai et al., arXiv:2111.07991): with the image tower locked, its tokens are computed once,
        the codes are fitted to them, and batches can be eight times as large. It takes minutes; interrupted, it begins
        again.
        """
        tokens, grid = self._locked_tokens()
        self.codebook.fit(tokens.flatten(0, 1), len(tokens) / self.options.batch_size)
        codes = torch.stack([self.book(row[None])[0] for row in tokens])
        features = self.reduce(F.embedding(codes, self.book.embed[0]), grid)
        scale = 1 / features.std(dim=0).clamp(min=1e-6)
        projection = nn.Linear(features.shape[1], self.model.to_visual_latent.out_features, bias=False).to(self.device)
        _project_out(projection, features.mean(dim=0) * scale)
        texts = [*self.model.text_transformer.parameters(), *self.model.to_text_latent.parameters()]
        optimizer = torch.optim.AdamW([*projection.parameters(), *texts], weight_decay=0.01, betas=(0.9, 0.98))
        rng = np.random.default_rng([self.options.seed, 3])
        steps, size = self.options.tuning_steps, min(self.options.tuning_batch_size, len(features))
        for step in range(steps):
            self.model.text_transformer.train()
            chosen = rng.permutation(len(features))[:size]
            labels, ids, mask = (part.to(self.device) for part in self.batches.texts(chosen, rng))
            for group in optimizer.param_groups:
                group["lr"] = _scheduled(self.options.learning_rate, step / steps, self.options.warm_up)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                reports, prompts = self.model.encode_text(ids, mask), self.model.encode_text(*self.prompt_ids)
            images = F.normalize(projection(features[chosen] * scale), dim=-1)
            statement = statement_loss(images, prompts.float().unflatten(0, (-1, 2)), labels)
            terms = {"report": report_loss(images, reports.float()),
                     "statement": STATEMENT_WEIGHT * focused_mean(statement)}
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values(), torch.zeros((), device=self.device)).backward()
            nn.utils.clip_grad_norm_([*projection.parameters(), *texts], 1.0)
            optimizer.step()
            with torch.no_grad():
                self.model.to_visual_latent.weight.copy_(projection.weight * scale)
            on_step(step + 1, {name: float(term.detach()) for name, term in terms.items()})

    @torch.no_grad()
    def _locked_tokens(self) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens ``[n, D'H'W', C]`` of every sample in evaluation mode, and their grid."""
        for module in (self.model, self.centre):
            module.eval()
        rows, grid = [], ()
        for start in range(0, len(self.batches.samples), self.options.batch_size):
            part = self.batches.samples[start : start + self.options.batch_size]
            tokens, grid = self.tokens(self.stages(torch.from_numpy(np.stack([sample.taps for sample in part])))[-1])
            rows.append(tokens)
        return torch.cat(rows), grid

    def _learning_rate(self) -> float:
        return _scheduled(self.options.learning_rate, self.step / self.options.steps, self.options.warm_up)

    @torch.no_grad()
    def monitor(self) -> dict[str, dict[str, float]]:
        """AUROC by finding on scans that are not trained on: "zero_shot", and "head" for comparison.

        With quantized tokens once there is a codebook. A finding that all or none of the scans have is left out.
        """
        for module in (self.model, self.centre, self.head):
            module.eval()
        rng = np.random.default_rng(0)
        margins: dict[str, list[Tensor]] = {"zero_shot": [], "head": []}
        labels = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            prompts = self.model.encode_text(*self.prompt_ids).float().unflatten(0, (-1, 2))
        for start in range(0, len(self.monitored), self.options.batch_size):
            batch = self.batches.collate(self.monitored[start : start + self.options.batch_size], rng)
            tokens, grid = self.tokens(self.stages(batch.taps)[-1])
            unit = F.normalize(tokens, dim=-1)
            if self.initted.item():
                unit = F.embedding(self.book(tokens), self.book.embed[0])
            reduced = self.reduce(unit, grid)
            margins["zero_shot"].append(self.project(reduced) @ (prompts[:, 0] - prompts[:, 1]).t())
            margins["head"].append(self.head(reduced))
            labels.append(batch.labels)
        label = torch.cat(labels).numpy()
        judged = [i for i in range(len(CT_RATE_CLASSES)) if 0 < label[:, i].sum() < len(label)]
        scores = {name: torch.cat(rows).cpu().numpy() for name, rows in margins.items()}
        return {name: {CT_RATE_CLASSES[i]: float(roc_auc_score(label[:, i], score[:, i])) for i in judged}
                for name, score in scores.items()}

    # ------------------------------------------------------------------ files

    def save_state(self) -> None:
        """Everything needed to go on."""
        state = {"model": self.model.state_dict(), "centre": self.centre.state_dict(), "head": self.head.state_dict(),
                 "localizer": self.localizer.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "step": self.step, "generator": self.generator.get_state(),
                 "torch_rng": torch.get_rng_state(), "options": asdict(self.options)}
        with atomic_file(self.out / STATE_NAME) as path:
            torch.save(state, path)

    def load_state(self) -> None:
        """Go on from a saved state.

        Raises:
            InputError: the state belongs to a training with other options.
        """
        path = self.out / STATE_NAME
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.options).items():
            if state["options"].get(name) != value:
                raise InputError(f"{path}: was trained with {name} {state['options'].get(name)}, not {value}; choose "
                                 "another --out")
        self.model.load_state_dict(state["model"])
        self.centre.load_state_dict(state["centre"])
        self.head.load_state_dict(state["head"])
        self.localizer.load_state_dict(state["localizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step = int(state["step"])

    def save_checkpoint(self) -> None:
        """The original format, without the optimizer's state, which is twice the size of the model.

        The codebook's running means are those of a codebook at rest, which makes them the codes: stored once.
        """
        form = get_encoder(ENCODER).checkpoint
        assert form is not None
        arguments = argparse.Namespace(model=form.name, reduction=REDUCTION,
                                       input_size=INPUT_SIZE, spacing_hwd_mm=list(PREPROCESSING.spacing_hwd_mm))
        self.centre.fold(self.encoder)
        book = "visual_transformer.vq._codebook."
        state = self.model.cpu().state_dict()
        state[f"{book}embed_avg"] = state[f"{book}embed"]
        state[f"{book}cluster_size"] = torch.ones_like(state[f"{book}cluster_size"])
        epoch = self.step * self.options.batch_size // (self.options.patients * VARIANTS)
        with atomic_file(self.out / CHECKPOINT_NAME) as path:
            torch.save({"model": state, "epoch": epoch, "args": arguments}, path)


def _scheduled(peak: float, progress: float, warm_up: float) -> float:
    """Linear warm-up from a hundredth, then half a cosine down to one; ``progress`` and ``warm_up`` in 0..1."""
    if progress < warm_up:
        return peak * (0.01 + 0.99 * progress / warm_up)
    turn = (progress - warm_up) / (1 - warm_up)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * turn)) / 2)


@torch.no_grad()
def _project_out(layer: nn.Linear, direction: Tensor) -> None:
    """Make a layer blind to one direction of its input."""
    unit = F.normalize(direction, dim=0)
    layer.weight -= torch.outer(layer.weight @ unit, unit)


def _parameter_groups(model: Clip, extra: Sequence[nn.Parameter]) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels, none for biases, norms and scales; a smaller rate for the text tower."""
    groups: list[dict[str, object]] = []
    texts = [*model.text_transformer.parameters(), *model.to_text_latent.parameters()]
    encoder = model.visual_transformer.encoder
    assert isinstance(encoder, DCFormer)
    late = list(late_parameters(encoder))
    ids = {id(parameter) for parameter in late}
    images = [p for p in model.visual_transformer.parameters() if id(p) not in ids]
    images += [*model.to_visual_latent.parameters(), *extra]
    for share, parameters in ((1.0, images), (TEXT_SHARE, texts), (LATE_SHARE, late)):
        groups.append({"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05, "share": share})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "share": share})
    return groups


def _mixed_precision(device: torch.device) -> bool:
    """Whether bfloat16 is fast here: on CPUs only with units for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
